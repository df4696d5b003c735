"""What the page asks for, and what it is told: JSON values by path. `server` sends them, the report embeds them."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipe.run.metrics import METRICS, Scalar, metric_of
from recipe.run.status import RunState
from recipe.run.watch.files import RunFiles, RunsFolder, changed_at
from recipe.run.watch.head import eval_sets, head, metric_table, state_text
from recipe.run.watch.samples import Query, SampleFiles
from recipe.system.errors import UserError
from recipe.system.json_text import parse_json


class Answers:
    """Of all runs of a folder. One question at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no such folder."""
        self._folder = RunsFolder(folder)

    def runs(self) -> dict[str, Any]:
        """The list of runs, the newest first."""
        listed = [_listed(RunFiles(self._folder.folder / name)) for name in self._folder.names()]
        return {"folder": str(self._folder.folder), "runs": listed}

    def head(self, name: str) -> dict[str, Any]:
        """What a run is, does and costs."""
        return head(self._folder.run(name))

    def metrics(self, name: str, after: int | None, generation: str | None) -> dict[str, Any]:
        """The columns of the steps after one; of all, where the page knows another generation of them."""
        return metrics_of(self._folder.run(name), after, generation)

    def course(self, name: str, rollout: int | None) -> dict[str, Any]:
        """How many sequences were under way in a rollout; the newest, where none is named."""
        run = self._folder.run(name)
        step = rollout + 1 if rollout is not None else (run.table.steps[-1] if run.table.steps else 0)
        found = run.course(step)
        if not found:
            return {"missing": f"step {step} has no rollout, or what its engines did was not kept"}
        place = run.table.steps.index(step) if step in run.table.steps else None
        restarts = run.table.columns.get("engine_restarts")
        return {
            "rollout": step - 1,
            "seconds": [seconds for seconds, _ in found],
            "running": [running for _, running in found],
            "total_seconds": found[-1][0],
            "restarts": (restarts[place] or 0) if restarts is not None and place is not None else 0,
        }

    def prepare_samples(self, name: str) -> bool:
        """Reads some of the numbers of samples that are new, so that the next question about them is answered at once.
        Returns whether there were any."""
        return self._folder.run(name).samples.refresh(_AT_ONCE)

    def samples(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """The samples that a query finds. Raises UserError for one that cannot be read."""
        run = self._folder.run(name)
        run.samples.refresh()
        return SampleFiles(run.path, run.samples).find(_parsed(query))

    def sample(self, name: str, rollout: int, line: int) -> dict[str, Any]:
        """One sample, with its group."""
        run = self._folder.run(name)
        return SampleFiles(run.path, run.samples).sample(rollout, line)


def _parsed(query: Mapping[str, str]) -> Query:
    try:
        return Query.model_validate(dict(query))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"the filter {first['loc'][0]}={first['input']!r} is not understood: {first['msg']}") from error


def _listed(run: RunFiles) -> dict[str, Any]:
    """A run in the list, from the last lines of its metrics alone."""
    status, lines = run.status, _last_lines(run.path / "metrics.jsonl")
    last = lines[-1] if lines else {}
    scores = [value for line in lines for name, value in line.items() if _is_score(name)]
    return {
        "name": run.name,
        "state": RunState.DIED if status is None else status.state,
        "state_text": "has left no status.json" if status is None else state_text(status),
        "step": last.get("step", 0) if status is None else status.step,
        "total_steps": None if status is None else status.total_steps,
        "reward": last.get("reward"),
        "held_out": scores[-1] if scores else None,
        "dollars": None if status is None else status.dollars,
        "changed": changed_at(run.path),
    }


def _is_score(name: str) -> bool:
    """Whether a metric is the score of an evaluation set: its sentence says what the others of the set are of."""
    return name.startswith("eval/") and metric_of(name) is METRICS["eval/NAME"]


def _last_lines(path: Path) -> list[Mapping[str, Scalar]]:
    """The last whole lines of a journal, of some steps; none where there is none."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _LOOKED_AT)
        file.seek(start)
        return [parse_json(line) for line in file.read().split(b"\n")[start > 0 : -1]]
    return []


_AT_ONCE = 1 << 20
"""Bytes of samples.jsonl that are read between two questions."""
_LOOKED_AT = 1 << 17
"""Bytes of metrics.jsonl, its last ones, that the list of runs is made from: some fifty steps."""


def metrics_of(run: RunFiles, after: int | None = None, generation: str | None = None) -> dict[str, Any]:
    """The columns of a run's steps, with the bands of those that have some."""
    table = run.table
    first = 0
    if after is not None and generation == run.generation:
        first = next((place for place, step in enumerate(table.steps) if step > after), len(table.steps))
    columns: dict[str, list[Scalar]] = {name: column[first:] for name, column in table.columns.items()}
    for name, (low, high) in _bands(run).items():
        for end, bound in (("low", low), ("high", high)):
            if bound in columns:
                columns[f"{name}:{end}"] = columns.pop(bound)
    return {
        "generation": run.generation,
        "steps": table.steps[first:],
        "columns": columns,
        "metrics": metric_table([name for name in columns if ":" not in name]),
    }


def _bands(run: RunFiles) -> dict[str, tuple[str, str]]:
    """The columns that are bounds of a band around another's curve."""
    sets = {f"eval/{name}": (f"eval/{name}_ci95_low", f"eval/{name}_ci95_high") for name in eval_sets(run)}
    return sets | {
        "reward": ("reward_ci95_low", "reward_ci95_high"),
        "response_length": ("response_length_p10", "response_length_p90"),
    }
