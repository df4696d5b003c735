"""What the user sees: the plan before, and the progress while it goes."""

from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from recipe.download.hub import HubFile
from recipe.download.plan import Plan, free_bytes
from recipe.download.record import Record


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.out(text, highlight=False)


def show_plan(plan: Plan, seconds: float, console: Console) -> None:
    """Prints what a plan that took `seconds` to make does: a line a file and a sum, or a line if it does nothing."""
    head = f"{plan.source}, commit {plan.record.commit}"
    if plan.finished:
        say(console, f"{head}: {plan.directory} is as recorded, {_contents(plan.record)} (hashed in {seconds:.1f} s)")
        return
    say(console, f"{head}, into {plan.directory}:")
    width = max(len(file.name) for file in plan.files)
    for file in plan.files:
        say(console, f"  {file.name:{width}}  {decimal(file.bytes):>8}  {_state(plan, file)}")
    total, to_fetch = sum(file.bytes for file in plan.files), plan.bytes_to_fetch
    say(
        console,
        f"{len(plan.files)} files, {decimal(total)}: {decimal(total - to_fetch)} there, {decimal(to_fetch)} to fetch; "
        f"{decimal(free_bytes(plan.directory))} free on the disk",
    )


def show_result(plan: Plan, record: Record, console: Console) -> None:
    """Prints that a plan was carried out."""
    say(console, f"{plan.directory} is complete and verified, {_contents(record)}")


def _contents(record: Record) -> str:
    rows = [file.rows for file in record.files.values() if file.rows is not None]
    count = f"{sum(rows):,} rows" if rows else f"{len(record.files)} files"
    return f"{count}, {decimal(sum(file.bytes for file in record.files.values()))}"


def _state(plan: Plan, file: HubFile) -> str:
    if file not in plan.missing:
        return "there, verified"
    fetched = plan.fetched(file)
    return f"to fetch, but for {decimal(fetched)} fetched earlier" if fetched else "to fetch"


class TransferDisplay:
    """Use as a context manager while files arrive: a line a file with the speed of the last half minute, and on a
    terminal a bar below."""

    def __init__(self, files: Sequence[HubFile], bytes_to_fetch: int, console: Console) -> None:
        self._bar = Progress(
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._files = len(files)
        self._finished = 0
        self._transfer = self._bar.add_task("", total=bytes_to_fetch)

    def advance(self, count: int) -> None:
        """`count` bytes have arrived."""
        self._bar.update(self._transfer, advance=count)

    def repeat(self, count: int) -> None:
        """`count` bytes that had arrived have to come again."""
        self._bar.update(self._transfer, total=(self._bar.tasks[self._transfer].total or 0) + count)

    def finish(self, file: HubFile) -> None:
        """A file is verified and in its place."""
        self._finished += 1
        task = self._bar.tasks[self._transfer]
        parts = [f"{file.name} ({decimal(file.bytes)}) is verified, {self._finished} of {self._files} files"]
        parts.append(f"{decimal(int(task.completed))} of {decimal(int(task.total or 0))}")
        if task.speed is not None:
            parts.append(f"{decimal(int(task.speed))}/s")
        if task.time_remaining:
            parts.append(f"{timedelta(seconds=task.time_remaining)} to go")
        say(self._bar.console, ", ".join(parts))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.stop()
