"""A child that ends with its parent, however that ends (prctl(2), PR_SET_PDEATHSIG)."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """From now on Linux kills this process when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with(parent: int) -> None:
    """In a child of process `parent`, before its program runs: it ends when the parent does, or has already."""
    end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
