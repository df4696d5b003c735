"""The run directory and the terminal: what a run leaves behind and what it shows while it goes."""
