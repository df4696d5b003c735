"""Which samples are computed together, and where: pure functions of lengths. Samples are named by their index."""
