"""The stages of a run, in this process or on Ray."""
