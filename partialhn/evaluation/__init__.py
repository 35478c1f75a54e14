"""Evaluation: metrics of learning and forgetting, and forecasts before training."""
