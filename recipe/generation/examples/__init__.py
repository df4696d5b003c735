"""Worked examples of `--custom-generate-function-path`."""
