"""The training of the trunk and of one task after the other."""
