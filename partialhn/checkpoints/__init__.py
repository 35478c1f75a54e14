"""What is learned, on disk: safetensors and JSON, never a pickle."""
