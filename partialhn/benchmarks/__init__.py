"""Comparisons of strategies that one command reproduces."""
