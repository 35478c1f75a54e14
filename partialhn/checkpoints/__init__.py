"""Checkpoints: trained models on disk as safetensors and JSON, never as a pickle."""

TENSORS, FIELDS = "model.safetensors", "model.json"
"""The files of a checkpoint; here, because `checkpoint.py` imports torch, which takes seconds."""
