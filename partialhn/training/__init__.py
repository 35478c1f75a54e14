"""Training: the trunk once, then one task after the other."""
