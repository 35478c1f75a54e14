"""The report of a stream."""
