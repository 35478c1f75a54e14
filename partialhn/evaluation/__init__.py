"""Measurements of what a model learned and forgot, and forecasts before training."""
