"""Executing the phases of a run, in this process or on Ray."""
