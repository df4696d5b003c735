"""A step that a run kept, scored or taken once more by the trainer, alone in a process of its own."""
