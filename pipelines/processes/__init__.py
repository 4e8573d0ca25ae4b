"""How stages run: DVC's graph, a stage as a process that cannot outlive us, orders to end, locks, progress."""
