"""torch's setting that neither CUDA's handles nor SGLang's memory saver go together with: expandable segments."""

import os

EXPANDABLE = "expandable_segments:True"
_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that torch reads its allocator's settings from."""


def segments_are_expandable() -> bool:
    """Whether this process's environment asks for them."""
    return any(EXPANDABLE in os.environ.get(name, "").split(",") for name in _SETTINGS)


def without_expandable_segments() -> dict[str, str]:
    """The variables that a process has to have instead to do without them."""
    given = {name: os.environ[name].split(",") for name in _SETTINGS if name in os.environ}
    return {name: ",".join(part for part in parts if part != EXPANDABLE) for name, parts in given.items()}
