"""Partial hypernetworks at scale: Ray, MLflow and object storage around `partialhn`."""
