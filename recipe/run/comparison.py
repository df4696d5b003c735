"""evals.jsonl: the score of every problem of an evaluation set, and what two evaluations differ by."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.messages import Evaluated
from recipe.run.journal import Journal
from recipe.run.statistics import Difference, mean_difference, paired_difference
from recipe.system.errors import UserError
from recipe.system.json_text import read_json

FILE = "evals.jsonl"
_SEED = 0
"""Of the sign flips behind a p-value."""
_MATTERS = {
    "eval": ("n_samples_per_eval_prompt", "eval_max_response_len", "eval_temperature", "eval_top_p", "eval_top_k"),
    "rollout": ("rollout_max_response_len", "rollout_temperature", "rollout_top_p", "rollout_top_k"),
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


def paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Compared:
    """Two lines of evals.jsonl. Raises UserError if they are not of the same number of problems."""
    scores = a["scores"], b["scores"]
    if len(scores[0]) != len(scores[1]):
        raise UserError(
            f"the set {a['set']} had {len(scores[0])} problems at step {a['step']} and {len(scores[1])} at step "
            f"{b['step']}: evaluate on one file"
        )
    samples = a["samples_per_problem"], b["samples_per_problem"]
    are_shares = all(0 <= score <= 1 for one in scores for score in one)
    means = tuple(sum(one) / len(one) for one in scores)
    return Compared(
        a["set"],
        (a["step"], b["step"]),
        (means[0], means[1]),
        paired_difference(*scores, samples, _SEED) if are_shares else mean_difference(*scores, _SEED),
        len(scores[0]),
    )


def newest(run: Path) -> dict[str, dict[str, Any]]:
    """The newest evaluation of each set of a run, by the set's name."""
    return {line["set"]: line for line in Journal(run / FILE).read()}


def gain(run: Path, name: str) -> Compared | None:
    """A set's newest score less the one before the first step; None where either is missing."""
    lines = [line for line in Journal(run / FILE).read() if line["set"] == name]
    before = next((line for line in lines if line["step"] == 0), None)
    return None if before is None or lines[-1]["step"] == 0 else paired(lines[-1], before)


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
            values = [config[group].get(name) for config in configs]
            if values[0] != values[1]:
                yield f"--{name.replace('_', '-')} is {values[0]} in {a.name} and {values[1]} in {b.name}"
    hashes = [_eval_hashes(manifest) for manifest in manifests]
    for name in hashes[0].keys() & hashes[1].keys():
        if hashes[0][name] != hashes[1][name]:
            yield f"the set {name} is not the same file in both: its hashes differ"


def _eval_hashes(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """The hash of each evaluation set's file, by the set's name."""
    return {name: manifest["sha256"].get(path) for name, path in manifest["config"]["eval"]["eval_prompt_data"]}
