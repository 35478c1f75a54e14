"""Scheduled retraining: arriving tasks are validated, learned, gated and registered."""
