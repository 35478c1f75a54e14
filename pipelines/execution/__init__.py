"""The phases of a run, in this process or on Ray."""
