"""evals.jsonl: the score of every problem of an evaluation set, and what two evaluations differ by."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.messages import Evaluated
from recipe.run.journal import Journal
from recipe.run.statistics import (
    Difference,
    Estimate,
    clustered_mean,
    mean_difference,
    paired_difference,
    paired_estimate,
)
from recipe.system.errors import UserError
from recipe.system.json_text import read_json

FILE = "evals.jsonl"
_SEED = 0
"""Of the sign flips behind a p-value."""
_MATTERS = {
    "eval": (
        *("n_samples_per_eval_prompt", "eval_max_response_len", "eval_temperature", "eval_top_p", "eval_top_k"),
        *("eval_instruction", "eval_labels", "eval_input_key", "eval_label_key", "eval_function_path"),
    ),
    "rollout": (
        *("rollout_max_response_len", "rollout_temperature", "rollout_top_p", "rollout_top_k"),
        *("rollout_stop", "rm_type", "custom_rm_path"),
    ),
    "data": ("apply_chat_template", "apply_chat_template_kwargs"),
}
"""Settings that make two evaluations differ by more than their weights."""


def evaluation_line(step: int, name: str, found: Evaluated) -> dict[str, Any]:
    """The line of an evaluation of the set `name` after a step."""
    return {
        "step": step,
        "set": name,
        "samples_per_problem": found.samples_per_problem,
        "scores": [round(score, 6) for score in found.scores],
    }


@dataclass(frozen=True)
class Compared:
    """Two evaluations, A and B, of the same problems."""

    set: str
    steps: tuple[int, int]
    """After which they were made."""
    means: tuple[float, float]
    """Mean scores."""
    difference: Difference
    """A - B."""
    problems: int


def scores_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The scores of two lines of evals.jsonl. Raises UserError if they are not of the same number of problems."""
    if len(a["scores"]) != len(b["scores"]):
        raise UserError(
            f"the set {a['set']} had {len(a['scores'])} problems at step {a['step']} and {len(b['scores'])} at step "
            f"{b['step']}: evaluate on one file"
        )
    return a["scores"], b["scores"]


def are_shares(*scores: Sequence[float]) -> bool:
    """Whether scores may be shares of right answers; rewards of a user's own may be any numbers."""
    return all(0 <= score <= 1 for one in scores for score in one)


def paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Compared:
    """Two lines of evals.jsonl. Raises UserError if they are not of the same number of problems."""
    left, right = scores_of(a, b)
    samples = a["samples_per_problem"], b["samples_per_problem"]
    return Compared(
        a["set"],
        (a["step"], b["step"]),
        (sum(left) / len(left), sum(right) / len(right)),
        paired_difference(left, right, samples, _SEED)
        if are_shares(left, right)
        else mean_difference(left, right, _SEED),
        len(left),
    )


def newest(run: Path) -> dict[str, dict[str, Any]]:
    """The newest evaluation of each set of a run, by the set's name."""
    return {line["set"]: line for line in Journal(run / FILE).read()}


def gain(run: Path, name: str) -> Estimate | None:
    """A set's newest score less the one before the first step; None where there are not both, or they are too few or
    too alike to say anything. Raises UserError if the two are not of the same number of problems."""
    lines = [line for line in Journal(run / FILE).read() if line["set"] == name]
    before = next((line for line in lines if line["step"] == 0), None)
    if before is None or lines[-1]["step"] == 0:
        return None
    left, right = scores_of(lines[-1], before)
    if are_shares(left, right):
        return paired_estimate(left, right, (lines[-1]["samples_per_problem"], before["samples_per_problem"]))
    found = clustered_mean([a - b for a, b in zip(left, right, strict=True)])
    return found if math.isfinite(found.low) and found.low < found.high else None


def compare_runs(a: Path, b: Path) -> list[Compared]:
    """The newest evaluations of both runs, A - B, for every set that both have. Raises UserError if they have none in
    common."""
    of_a, of_b = newest(a), newest(b)
    if not (common := [name for name in of_a if name in of_b]):
        raise UserError(
            f"{a} and {b} have no evaluation of one set: their --eval-prompt-data must have a name in common"
        )
    return [paired(of_a[name], of_b[name]) for name in common]


def obstacles(a: Path, b: Path) -> Iterator[str]:
    """What keeps the difference of two runs from being that of their weights, a sentence each."""
    manifests = [read_json(run / "manifest.json", dict[str, Any], "restore the file") for run in (a, b)]
    configs = [manifest["config"] for manifest in manifests]
    for group, names in _MATTERS.items():
        for name in names:
            values = [config.get(group, {}).get(name) for config in configs]
            if values[0] != values[1]:
                yield f"--{name.replace('_', '-')} is {values[0]} in {a.name} and {values[1]} in {b.name}"
    hashes = [_eval_hashes(manifest) for manifest in manifests]
    for name in hashes[0].keys() & hashes[1].keys():
        if hashes[0][name] != hashes[1][name]:
            yield f"the set {name} is not the same file in both: its hashes differ"


def _eval_hashes(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """The hash of each evaluation set's file, by the set's name."""
    return {name: manifest["sha256"].get(path) for name, path in manifest["config"]["eval"]["eval_prompt_data"]}
