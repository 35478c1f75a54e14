"""Partial hypernetworks for continual learning: a plain PyTorch and Arrow library.

Nothing here imports Ray, MLflow or an S3 client, and importing it starts nothing.
"""

__version__ = "0.1.0"
