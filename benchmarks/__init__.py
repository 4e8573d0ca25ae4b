"""Times beside peers: each module is a command that prints one JSON line; needs what `dino` needs."""
