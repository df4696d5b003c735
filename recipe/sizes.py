"""Sizes of buffers that the code makes and the plan counts."""

SLOT_ELEMENTS = 4 << 20
"""Elements of a pinned staging buffer of CPU Adam: gradients leave and weights return in pieces of this size, small
enough that a piece is still in the CPU's cache when its weights are rounded, large enough for all threads."""
OBJECT_STORE_BYTES = 256 << 20
"""Of Ray's object store: enough for the samples of a rollout; weights never pass through Ray."""
