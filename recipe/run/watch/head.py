"""What a run is, does and costs, as the head of its page has it."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from recipe.config.flags import all_flags
from recipe.config.resolved import shown_value
from recipe.run.metrics import metric_of
from recipe.run.planned import PlannedMemory
from recipe.run.status import LIVING, RunState, Status
from recipe.run.watch.files import RunFiles
from recipe.system.errors import UserError

PACE_STEPS = 20
"""The time to go is judged by so many last steps."""
_SHOWN_PACKAGES = ("torch", "megatron-core", "transformers", "ray", "sglang", "numpy")


def head(run: RunFiles) -> dict[str, Any]:
    """Everything about a run but its curves and samples."""
    status, table, planned = run.status, run.table, run.planned
    checkpoint, memory = run.checkpoint(), run.newest_conditions
    pace = seconds_a_step(run)
    to_go = None
    if status is not None and status.state in LIVING and pace is not None:
        to_go = max(0.0, (status.total_steps - status.step) * pace)
    misc = run.config.get("misc", {})
    return {
        "name": run.name,
        **_state(run, status),
        **_cost(status, to_go),
        "now": time.time(),
        "max_dollars": misc.get("max_dollars"),
        "max_hours": misc.get("max_hours"),
        "step_seconds": {"measured": pace, "planned": planned.step_s},
        "checkpoint": None if checkpoint is None else asdict(checkpoint),
        "save_interval": run.config.get("checkpoint", {}).get("save_interval"),
        "gpu_memory": _memory(_most(table.columns.get("max_memory_reserved")), planned.gpu, None),
        "host_memory": _memory(
            memory.host_memory_used if memory else None, planned.host, memory.host_memory if memory else None
        ),
        "advice": [
            {
                "rule": one.rule,
                "step": one.step,
                "sentence": one.sentence,
                "reason": one.reason,
                "link": one.page,
            }
            for one in run.adviser.standing.values()
        ],
        "eval_sets": eval_sets(run),
        **_origin(run.manifest),
    }


def _state(run: RunFiles, status: Status | None) -> dict[str, Any]:
    """State, step and phase; a run that says nothing of itself is one that has ended."""
    if status is None:
        steps = run.table.steps
        total = run.config.get("rollout", {}).get("num_rollout", steps[-1] if steps else 0)
        what = {"state": RunState.DIED, "state_text": "this run has left no status.json", "error": run.error}
        return what | {"step": steps[-1] if steps else 0, "total_steps": total, "phase": None, "phase_since": None}
    return {
        "state": status.state,
        "state_text": state_text(status),
        "error": status.doing if status.state is RunState.FAILED else None,
        "step": status.step,
        "total_steps": status.total_steps,
        "phase": status.doing if status.state in LIVING else None,
        "phase_since": status.since if status.state in LIVING else None,
    }


def state_text(status: Status) -> str:
    """A run's state in a few words."""
    doing = status.doing.replace("_", " ")
    match status.state:
        case RunState.STARTING:
            return f"starting: {doing}"
        case RunState.RUNNING:
            return f"step {status.step + 1}: {doing}"
        case RunState.SAVING:
            return f"saving after step {status.step}"
        case RunState.FINISHED:
            return "finished"
        case RunState.INTERRUPTED:
            return f"interrupted {status.doing} after step {status.step}"
        case RunState.STOPPED:
            return f"stopped after step {status.step}: {status.doing}"
        case RunState.FAILED:
            return f"failed after step {status.step}"
    return f"died in step {status.step + 1}, in {doing}, without a word: go on with --load"


def _cost(status: Status | None, to_go: float | None) -> dict[str, Any]:
    if status is None:
        return dict.fromkeys(
            ("began", "seconds_so_far", "seconds_to_go", "dollars_so_far", "dollars_to_go", "price", "gpus")
        )
    rate = status.dollars_a_second
    return {
        "began": status.began,
        "seconds_so_far": status.seconds,
        "seconds_to_go": to_go,
        "dollars_so_far": status.dollars,
        "dollars_to_go": None if to_go is None else to_go * rate,
        "price": status.price,
        "gpus": status.gpus,
    }


def seconds_a_step(run: RunFiles) -> float | None:
    """The mean of the newest steps, evaluations and checkpoints included; None before the first."""
    seconds = run.table.columns.get("seconds_step", [])
    newest = [value for value, step in zip(seconds, run.table.steps, strict=True) if step and value is not None]
    return statistics.fmean(newest[-PACE_STEPS:]) if newest else None


def _most(column: list[Any] | None) -> float | None:
    return max((value for value in column or [] if value is not None), default=None)


def _memory(measured: float | None, planned: PlannedMemory | None, capacity: int | None) -> dict[str, Any]:
    if planned is None:
        return {"measured": measured, "planned": None, "capacity": capacity}
    return {"measured": measured, "planned": planned.total, "capacity": capacity or planned.capacity}


def eval_sets(run: RunFiles) -> list[str]:
    """The evaluation sets of a run."""
    return [name for name, _ in run.config.get("eval", {}).get("eval_prompt_data") or []]


def _origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    versions = manifest.get("versions", {})
    packages = versions.get("packages", {})
    git, image = manifest.get("git"), manifest.get("image")
    return {
        "recipe": manifest.get("recipe"),
        "difference_from_recipe": list(_difference(manifest)),
        "versions": {"python": versions.get("python")}
        | {one: packages[one] for one in _SHOWN_PACKAGES if one in packages},
        "commit": None if git is None else git["commit"] + (" and changes" if git["dirty"] else ""),
        "image": None if image is None else image,
        "hashes": manifest.get("sha256", {}),
    }


def _difference(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    flags: dict[str, str] = {}
    for flag in all_flags():
        flags.setdefault(flag.key, flag.text)
    rows = []
    for key, before in manifest.get("instead_of", {}).items():
        group, _, name = key.partition(".")
        now = manifest["config"].get(group, {})
        for part in name.split(".", 1):
            now = now.get(part) if isinstance(now, dict) else None
        rows.append(
            {
                "flag": flags.get(key, f"--sglang-{name.removeprefix('args.')}"),
                "recipe": shown_value(before),
                "run": shown_value(now),
            }
        )
    return rows


def metric_table(names: list[str]) -> dict[str, dict[str, str]]:
    """Unit and sentence of each column, by its name."""
    found = {}
    for name in names:
        try:
            metric = metric_of(name)
            found[name] = {"unit": metric.unit, "sentence": metric.sentence}
        except UserError:
            found[name] = DERIVED.get(name, {"unit": "", "sentence": ""})
    return found


DERIVED = {
    "gpu_idle_share": {
        "unit": "share",
        "sentence": "Share of the step in which GPUs have nothing or too little to do: what a rollout's tail leaves of "
        "the engines, and what lies between the phases.",
    }
}
"""Columns that are computed here, from the conditions of a step."""
