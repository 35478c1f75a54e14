"""The results of a benchmark as tables, drawings and a page."""
