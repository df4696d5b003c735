"""Prompt files, tokenizers, the order in which prompts are drawn, and the built-in task."""
