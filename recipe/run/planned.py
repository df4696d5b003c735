"""plan.json: what `make plan` said of a run on the machine that it was started on, in the fields that
`python -m recipe.plan --schema` explains."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from recipe.system.json_text import parse_json

FILE = "plan.json"
TRAINING = "training"
"""The phase of a GPU in which the trainer works, and measures its memory."""
OUTSIDE_TORCH = "communication", "processes"
"""Uses of memory that a trainer's own measurement leaves out."""


@dataclass(frozen=True)
class PlannedMemory:
    """Of a GPU, or of a machine, in bytes."""

    total: int
    capacity: int

    @classmethod
    def of(cls, phases: Iterable[Mapping[str, Any]]) -> Self | None:
        """The phase that leaves least; None where there is none."""
        fullest = min(phases, key=lambda phase: phase["margin"], default=None)
        return None if fullest is None else cls(fullest["total"], fullest["capacity"])


@dataclass(frozen=True)
class Planned:
    """What a run was planned to take; None where it was not planned, as without GPUs."""

    step_s: tuple[float, float] | None = None
    """Seconds of a step, at best and at worst."""
    gpu: PlannedMemory | None = None
    """The trainer's tensors in its passes, which the run measures."""
    host: PlannedMemory | None = None
    """In its fullest phase."""

    @classmethod
    def read(cls, run: Path) -> Self:
        """What the file of a run says; nothing where there is none that can be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            plan = parse_json((run / FILE).read_bytes())
            time, gpu = plan["time"], plan["gpu"] or {}
            return cls(
                step_s=None if time is None else (time["step_s"][0], time["step_s"][1]),
                gpu=_tensors(gpu[TRAINING]) if TRAINING in gpu else None,
                host=PlannedMemory.of(plan["host"].values()),
            )
        return cls()


def _tensors(phase: Mapping[str, Any]) -> PlannedMemory:
    outside = sum(phase["uses"].get(use, 0) for use in OUTSIDE_TORCH)
    return PlannedMemory(phase["total"] - outside, phase["capacity"])
