"""The feature store: features of the frozen trunk, computed once and kept in Arrow files."""
