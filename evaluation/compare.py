"""Compares two results of `evaluation.aime` on the same problems.

Usage: python -m evaluation.compare A B [--json]

A and B are result.json files, or directories that hold them. Prints the paired difference A - B of avg@n with its 95%
interval, clustered by problem, and two-sided p-values: of the paired t test, and of flipping signs.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation.grading import Verdict
from evaluation.result import ProblemResult, Result, read_result
from recipe.rewards.plain import canonical_integer
from recipe.run.statistics import Difference, paired_difference
from recipe.system.errors import UserError, run_main


@dataclass(frozen=True)
class Comparison:
    """A and B on the problems of both."""

    difference: Difference
    problems: int
    better: int
    """Problems on which A is better."""
    worse: int
    notes: tuple[str, ...]
    """Why the two are not comparable; none if they are."""


def compare(a: Result, b: Result) -> Comparison:
    """Raises UserError if the two are of different problems, or do not agree on the answers."""
    left = {problem.id: problem for problem in a.problems}
    right = {problem.id: problem for problem in b.problems}
    if only := sorted(left.keys() ^ right.keys()):
        raise UserError(
            f"A and B are of different problems, {len(only)} of them only in one, such as {only[0]}: evaluate both on "
            "the same file"
        )
    other = next((name for name in left if _label(left[name]) != _label(right[name])), None)
    if other is not None:
        raise UserError(f"A and B have different labels for problem {other}: evaluate both on the same file")
    shares = [(left[name].correct_share, right[name].correct_share) for name in left]
    samples = a.settings.sampling.n_samples, b.settings.sampling.n_samples
    difference = paired_difference(
        [share for share, _ in shares], [share for _, share in shares], samples, a.settings.sampling.seed
    )
    return Comparison(
        difference,
        len(shares),
        sum(a > b for a, b in shares),
        sum(a < b for a, b in shares),
        tuple(_obstacles(a, b)),
    )


def _label(problem: ProblemResult) -> str:
    return canonical_integer(problem.label) or problem.label


def _obstacles(left: Result, right: Result) -> Iterator[str]:
    """What keeps the difference from being that of two models. Numbers of samples may differ: each mean is unbiased."""
    a, b = left.settings, right.settings
    lengths = a.sampling.max_response_len, b.sampling.max_response_len
    if lengths[0] != lengths[1]:
        yield (
            f"A was taken at up to {lengths[0]:,} tokens and B at up to {lengths[1]:,}: they are not comparable, as "
            "the shorter one cuts off what the longer one lets finish"
        )
    for name in ("temperature", "top_p", "top_k"):
        values = getattr(a.sampling, name), getattr(b.sampling, name)
        if values[0] != values[1]:
            yield f"{name} was {values[0]:g} for A and {values[1]:g} for B"
    if a.context_length != b.context_length:
        yield f"the context was {a.context_length:,} tokens for A and {b.context_length:,} for B"
    if a.prompts_sha256 != b.prompts_sha256:
        yield "the prompts are not the same, as their hashes differ"
    if (a.model_sha256, a.engine, a.sampling) == (b.model_sha256, b.engine, b.sampling):
        yield "A and B are of one model with one seed: their samples are the same draw, and not independent"
    for name, result in (("A", left), ("B", right)):
        if failed := result.score.verdicts.get(Verdict.GRADER_FAILED):
            yield f"{failed} samples of {name} could not be graded, and count as not correct"


def describe(a: Result, b: Result, found: Comparison) -> str:
    """The comparison in a few lines."""
    estimate = found.difference.estimate
    equal = found.problems - found.better - found.worse
    lines = [
        f"{name}: avg@{result.settings.sampling.n_samples} {result.score.avg_at_n.mean:.1%}  {result.settings.model}"
        for name, result in (("A", a), ("B", b))
    ]
    lines += [
        f"A - B: {100 * estimate.mean:+.1f} points, "
        f"95% interval {100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}",
        f"p = {found.difference.p_value:.4f} (paired t), {found.difference.p_value_signs:.4f} (sign flips)",
        f"{found.problems} problems: A better on {found.better}, B on {found.worse}, equal on {equal}",
    ]
    return "\n".join([*(f"note: {note}" for note in found.notes), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args()
    a, b = read_result(arguments.a), read_result(arguments.b)
    found = compare(a, b)
    print(json.dumps(asdict(found), indent=1, allow_nan=False) if arguments.json else describe(a, b, found))


if __name__ == "__main__":
    run_main(main)
