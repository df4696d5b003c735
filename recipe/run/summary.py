"""summary.json: what a run came to."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipe.run.metrics import eval_metric

_SECONDS = "seconds_"


def summarize(
    lines: Sequence[Mapping[str, Any]],
    eval_names: Sequence[str],
    outcome: str,
    wall_s: float,
    start: Mapping[str, float],
) -> dict[str, Any]:
    """From the lines of metrics.jsonl. `eval.before` and `eval.after` are the held-out mean rewards before the first
    step and after the last evaluated one, of the first evaluation set; `eval.sets` has every set. None: not evaluated.
    `wall_s` is the time since the command began, `seconds` the sums of the phases over all steps,
    `start` the seconds of the last command's start (`recipe.run.start`)."""
    sets = {name: _before_and_after(lines, name) for name in eval_names}
    first: dict[str, Any] = next(iter(sets.values()), {"before": None, "after": None})
    steps = [line for line in lines if line["step"] > 0]
    phases = sorted({name for line in steps for name in line if name.startswith(_SECONDS)})
    return {
        "outcome": outcome,
        "steps": len(steps),
        "eval": first | {"sets": sets},
        "last_step": dict(steps[-1]) if steps else None,
        "seconds": {name.removeprefix(_SECONDS): sum(line.get(name, 0.0) for line in steps) for name in phases},
        "start": dict(start),
        "wall_s": wall_s,
    }


def _before_and_after(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    evaluated = [line for line in lines if eval_metric(name) in line]
    moments = {
        "before": next((line for line in evaluated if line["step"] == 0), None),
        "after": next((line for line in reversed(evaluated) if line["step"] > 0), None),
    }
    result: dict[str, Any] = {}
    for moment, line in moments.items():
        result[moment] = line and line[eval_metric(name)]
        result[f"{moment}_ci95"] = line and [line[eval_metric(name, bound)] for bound in ("ci95_low", "ci95_high")]
    return result
