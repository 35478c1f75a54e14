"""Data in: image data sets in any of their forms, cut into a stream of tasks."""
