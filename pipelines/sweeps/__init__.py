"""What a sweep tries, in which order, what is known of it, and its table."""
