"""Ends processes when the program that started this one is gone, however it went, and removes its folder:

python -m recipe.system.reaper FOLDER

Standard input: a process id a line, then an empty line. Its end is the end of the program.
"""

import os
import selectors
import shutil
import signal
import sys
import time
from contextlib import suppress

GRACE_S = 3.0
"""Time that processes have to end by themselves, and then to heed a SIGTERM."""


def main() -> None:
    living = selectors.DefaultSelector()
    while line := sys.stdin.readline().strip():
        with suppress(ProcessLookupError):
            living.register(os.pidfd_open(int(line)), selectors.EVENT_READ)
    sys.stdin.read()
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        for key in living.get_map().values():
            with suppress(ProcessLookupError):
                if number is not None:
                    signal.pidfd_send_signal(key.fd, number)
        _wait(living)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


def _wait(living: selectors.BaseSelector) -> None:
    deadline = time.monotonic() + GRACE_S
    while living.get_map() and time.monotonic() < deadline:
        for key, _ in living.select(deadline - time.monotonic()):
            living.unregister(key.fd)


if __name__ == "__main__":
    main()
