"""Features of every task, computed once and kept in use."""
