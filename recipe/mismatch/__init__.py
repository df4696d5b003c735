"""The bill of a mismatch: how much of the difference between trainer and engine each of its causes makes."""
