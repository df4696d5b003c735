"""A run's directory as the page needs it, read a part at a time while the run writes it.

Letters: S steps so far.
"""

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.run import conditions
from recipe.run.advice import Adviser
from recipe.run.conditions import Conditions
from recipe.run.journal import LineReader
from recipe.run.metrics import Scalar
from recipe.run.planned import Planned
from recipe.run.sample_index import SampleIndex
from recipe.run.status import Status, read_status
from recipe.system.errors import UserError
from recipe.system.json_text import parse_json

_CHECKPOINT = re.compile(r"iter_(\d+)")
DIGITS = 6
"""Significant ones of a value that goes to the page."""


@dataclass(frozen=True)
class Checkpoint:
    """The newest one of a run."""

    step: int
    written: float
    """Seconds since 1970."""


@dataclass
class Table:
    """The lines of metrics.jsonl by column, and what was derived from other files."""

    steps: list[int] = field(default_factory=list)
    """[S]"""
    columns: dict[str, list[Scalar]] = field(default_factory=dict)
    """[S] each."""

    def add(self, line: Mapping[str, Scalar]) -> None:
        """Adds a line; columns that it lacks are None there."""
        for name, value in line.items():
            if name != "step":
                known = self.columns.setdefault(name, [None] * len(self.steps))
                known.append(None if value is None else float(f"{value:.{DIGITS}g}"))
        self.steps.append(int(line["step"] or 0))
        for column in self.columns.values():
            if len(column) < len(self.steps):
                column.append(None)


class RunFiles:
    """What is known of the run in a directory; `refresh` reads what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self.generation = ""
        """Another whenever the metrics are others than they were, as after a run was cut back."""
        self.table = Table()
        self.samples = SampleIndex(path)
        self._metrics = LineReader(path / "metrics.jsonl")
        self._conditions = LineReader(path / conditions.FILE)
        self._read_manifest = 0.0
        self._begin()

    def _begin(self) -> None:
        self.table = Table()
        self._of_step: dict[int, Conditions] = {}
        self.adviser = Adviser(self.config, self._longest_step())
        self.newest_conditions: Conditions | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration by groups."""
        found: Mapping[str, Any] = self.manifest.get("config", {})
        return found

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def planned(self) -> Planned:
        """What the run was planned to take."""
        return Planned.read(self.path)

    @property
    def status(self) -> Status | None:
        """What the run is doing; None where it does not say."""
        found = read_status(self.path)
        return None if found is None else found.now()

    @property
    def error(self) -> str | None:
        """Why the run has ended; None where it says nothing of that."""
        with suppress(OSError, ValueError):
            outcome = str(parse_json((self.path / "summary.json").read_bytes())["outcome"])
            return outcome.removeprefix("failed: ") if outcome.startswith("failed") else None
        return None

    def _longest_step(self) -> float | None:
        return None if self.planned.step_s is None else self.planned.step_s[1]

    def refresh(self) -> None:
        """Reads what was written since the last time. Raises UserError for a file that is damaged."""
        self._refresh_manifest()
        lines, anew = self._metrics.new_lines()
        if anew:
            self.generation = secrets.token_hex(4)
            self._begin()
            self._conditions = LineReader(self.path / conditions.FILE)
        of_step, _ = self._conditions.new_lines()
        for line in of_step:
            self._of_step[line["step"]] = Conditions.from_line(line)
        for line in lines:
            found = self._of_step.pop(line["step"], None)
            self.table.add({**line, **_derived(line, found)})
            if self.config:
                self.adviser.take(line, found)
            self.newest_conditions = found or self.newest_conditions

    def _refresh_manifest(self) -> None:
        path = self.path / "manifest.json"
        with suppress(OSError, ValueError):
            if (changed := path.stat().st_mtime) != self._read_manifest:
                self.manifest, self._read_manifest = parse_json(path.read_bytes()), changed
                if not self.table.steps:
                    self._begin()

    def course(self, step: int) -> list[tuple[float, int]]:
        """How many sequences were under way in a step's rollout, by seconds; nothing where that was not kept."""
        mark = b'{"step": %d,' % step
        with suppress(OSError), (self.path / conditions.FILE).open("rb") as file:
            for line in file:
                if line.startswith(mark) and line.endswith(b"\n"):
                    found = parse_json(line)
                    return list(zip(found["seconds"], found["running"], strict=True))
        return []

    def checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint; None where there is none, or where it lies cannot be seen from here."""
        apart = self.config.get("checkpoint", {}).get("save")  # else they move with the run
        folder = Path(self.manifest.get("checkpoints", apart)) if apart else self.path / "checkpoints"
        found = [_checkpoint_at(path) for path in folder.glob("iter_*")] if folder.is_dir() else []
        return max((one for one in found if one is not None), key=lambda one: one.step, default=None)


def _checkpoint_at(path: Path) -> Checkpoint | None:
    number = _CHECKPOINT.fullmatch(path.name)
    with suppress(OSError):
        written = (path / ".metadata").stat().st_mtime
        return Checkpoint(int(number[1]), written) if number is not None else None
    return None


def _derived(line: Mapping[str, Scalar], of_step: Conditions | None) -> dict[str, Scalar]:
    """What follows from a line and the conditions of its step: the share of the step in which GPUs have nothing or too
    little to do. Of a rollout that is what its tail leaves of the engines, saves and what lies between the phases count
    whole."""
    step, rollout = line.get("seconds_step"), line.get("seconds_rollout")
    busy = of_step.busy_share if of_step is not None else None
    if not step or rollout is None or busy is None:
        return {}
    phases = sum(
        line.get(f"seconds_{name}") or 0.0 for name in ("log_probs", "train", "update_weights", "eval", "rollout")
    )
    return {"gpu_idle_share": min(1.0, (max(0.0, step - phases) + rollout * (1 - busy)) / step)}


class RunsFolder:
    """The runs of a folder, the newest first; or one run, where the folder is a run's own."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no such folder."""
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: name the one that holds the runs, runs/ by default")
        self._only = folder.resolve() if is_run(folder) else None
        self.folder = folder.resolve().parent if self._only else folder.resolve()
        self._open: dict[str, RunFiles] = {}

    def names(self) -> list[str]:
        """The runs that are there now."""
        if self._only is not None:
            return [self._only.name]
        found = [(changed_at(path), path.name) for path in self.folder.iterdir() if is_run(path)]
        return [name for _, name in sorted(found, reverse=True)]

    def run(self, name: str) -> RunFiles:
        """A run, refreshed. Raises UserError if there is none of that name."""
        if name not in self.names():
            raise UserError(f"there is no run {name!r} in {self.folder}")
        files = self._open.pop(name, None) or RunFiles(self.folder / name)
        self._open[name] = files
        for oldest in list(self._open)[:-_OPEN_RUNS]:
            del self._open[oldest]
        files.refresh()
        return files


_OPEN_RUNS = 6
"""Runs that are kept in memory at most."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, and may be looked into."""
    return any(os.access(path / name, os.R_OK) for name in ("manifest.json", "metrics.jsonl"))


def changed_at(path: Path) -> float:
    """When a run wrote last, in seconds since 1970."""
    return max((_written(path / name) for name in ("status.json", "metrics.jsonl", "manifest.json")), default=0.0)


def _written(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
