"""What was learned and forgotten, measured; and what may be expected before training."""
