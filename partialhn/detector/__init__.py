"""The detector: one classifier in closed form over the classes of all tasks."""
