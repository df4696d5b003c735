"""A worker process: serves one function over a pipe until the pipe or the parent is gone.

Usage: python -m recipe.rewards.serve FILE_DESCRIPTOR MODULE:FUNCTION

It first sends an empty text once the function is imported, or why it cannot be. Then it receives tuples of arguments
and sends for each a pair of the function's value and the failure, one of which is None or empty.
"""

import ctypes
import importlib
import resource
import signal
import sys
from multiprocessing.connection import Connection

MEMORY_BYTES = 2 << 30
"""Address space of a worker: a hostile answer meets a MemoryError, and not the machine's last page."""

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, target: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    connection = Connection(descriptor)
    module, function = target.split(":")
    try:
        call = vars(importlib.import_module(module))[function]
    except (ImportError, KeyError) as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = (call(*arguments), "")
        except Exception as error:
            reply = (None, f"{type(error).__name__}: {error}"[:200])
        connection.send(reply)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
