"""Maintaining the feature store: listing, verifying and pruning features."""
