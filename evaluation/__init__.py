"""Scores on held-out problems."""
