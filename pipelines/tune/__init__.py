"""The search for a freeze depth: Ray Tune runs the trials and the advice is written."""
