"""Data sets: where their files come from, what is in them, how they are checked and split."""
