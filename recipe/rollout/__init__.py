"""Rollouts: prompts to groups of samples, of all engines of a run."""
