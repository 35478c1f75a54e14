"""Serving a registered model over HTTP, and detecting drift in the images it gets."""
