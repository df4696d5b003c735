"""Commands in processes forked from one that has imported megatron: each saves the seconds of its imports."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TIMEOUT_S = 600


class Forked:
    """`function(*arguments)`, just begun, with its output in a file. Use as a context manager, which ends it."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._stack = ExitStack()
        self._output = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "output"
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(target=_run, args=(self._output, function, arguments))
        self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.join()
        self._stack.close()

    def end(self) -> tuple[int, str]:
        """Waits for it. Its exit status, and what it printed."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, self._output.read_text()
        return self.process.exitcode, self._output.read_text()


def _run(output: Path, function: Callable[..., object], arguments: tuple) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)


def forked(function: Callable[..., object], *arguments: Any) -> tuple[int, str]:
    """The exit status and the output of `function(*arguments)`."""
    with Forked(function, *arguments) as command:
        return command.end()


def run_module(name: str, words: list[str], environment: Mapping[str, str] | None = None) -> None:
    """`python -m name words`, with further variables."""
    os.environ.update(environment or {})
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__")


def run_script(path: Path, words: list[str]) -> None:
    """`python path words`."""
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")
