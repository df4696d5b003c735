"""GRPO as pure tensor maths: no processes, no configuration, no files. Letters in shapes: T tokens of a pack."""
