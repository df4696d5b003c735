"""How far a copy of many gigabytes has come, as lines that a log can hold."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

EVERY_S = 5.0
_GB = 1e9


class ByteProgress:
    """Prints, at most every EVERY_S seconds, bytes done, bytes a second and the time to go."""

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self._what, self._total, self._shown = what, total, shown
        self._done = 0
        self._began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """`done` bytes are done in all."""
        self._done = done
        if time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            self._print(f"{max(0, self._total - done) / max(1.0, self._rate):.0f} s to go")

    def finish(self) -> None:
        """Everything is done."""
        self._done = self._total
        self._print(f"done in {time.monotonic() - self._began:.1f} s")

    @property
    def _rate(self) -> float:
        return self._done / max(1e-9, time.monotonic() - self._began)

    def _print(self, end: str) -> None:
        if self._shown:
            amount = f"{self._done / _GB:.2f} of {self._total / _GB:.2f} GB"
            print(f"{self._what}: {amount}, {self._rate / _GB:.2f} GB/s, {end}", file=sys.stderr, flush=True)


@contextmanager
def watched_directory(what: str, directory: Path, total: int, *, shown: bool) -> Iterator[None]:
    """Shows how `directory` grows to `total` bytes while others write to it."""
    progress, over = ByteProgress(what, total, shown=shown), Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            progress.reach(sum(file.stat().st_size for file in directory.iterdir()))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    progress.finish()
