"""Exports: a task's network as an ordinary file that runs without this package."""
