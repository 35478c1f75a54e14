"""Checkpoints: trained models on disk as safetensors and JSON, never as a pickle."""
