"""What a run achieved, what it cost and where its time went: python -m recipe.run.report runs/NAME [--with runs/OTHER]

Prints it, and writes report.html into the run's directory: all of it in one file that needs no network, to send on.
With --with, the two runs' newest evaluations are compared problem by problem.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe.run.comparison import Compared, compare_runs, obstacles
from recipe.run.html_report import FILE, html_report
from recipe.run.journal import Journal, writing
from recipe.run.metrics import shown
from recipe.run.status import LIVING, read_status
from recipe.run.summary import summarize
from recipe.run.watch.files import RunFiles
from recipe.run.watch.head import eval_sets, state_text
from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text
from recipe.system.json_text import read_json


def report(directory: Path) -> Iterator[str]:
    """The lines of the report. Raises UserError if there is no run."""
    summary, status = _summary(directory), read_status(directory)
    took = f"{summary['wall_s']:.0f} s"
    if status is not None:  # it counts all commands of the run, the summary the last one
        took = f"{status.seconds:.0f} s, ${status.dollars:.2f} at ${status.price:g} an hour for each of {status.gpus}"
    yield f"{directory}: {summary['outcome']}, {summary['steps']} steps in {took}"
    for name, scores in summary["eval"]["sets"].items():
        yield f"  {name}: {_score(scores, 'before')} before, {_score(scores, 'after')} after"
    if last := summary["last_step"]:
        yield f"  last step: {', '.join(shown(last))}"
    total = sum(summary["seconds"].values()) - summary["seconds"].get("step", 0.0)
    for phase, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1]):
        if phase != "step" and total:
            yield f"  {phase:>16} {seconds:9.1f} s {seconds / total:6.1%}"
    run = RunFiles(directory)
    run.refresh()
    for advice in run.adviser.standing.values():
        yield f"  since step {advice.step}: {advice.sentence} ({advice.reason}; {advice.page})"


def _summary(directory: Path) -> dict[str, Any]:
    """summary.json; of a run that is going on, or was killed, what it would be now."""
    path, status = directory / "summary.json", read_status(directory)
    has_ended = status is None or status.state not in LIVING
    if path.is_file() and has_ended:
        return read_json(path, dict[str, Any], "go on with the run by --load, which writes it anew")
    if status is None or not (directory / "metrics.jsonl").is_file():
        raise UserError(f"{path} is not there: {directory} is no run, or one that has not made a step yet")
    run = RunFiles(directory)
    run.refresh()
    lines = Journal(directory / "metrics.jsonl").read()
    return summarize(lines, eval_sets(run), state_text(status.now()), status.seconds, {})


def _score(scores: Mapping[str, Any], moment: str) -> str:
    if scores[moment] is None:
        return "not scored"
    low, high = scores[f"{moment}_ci95"]
    return f"{scores[moment]:.4f} [{low:.4f}, {high:.4f}]"


def compared_lines(names: tuple[str, str], found: list[Compared], notes: list[str]) -> Iterator[str]:
    """What two runs differ by, in a few lines."""
    yield f"{names[0]} - {names[1]}:"
    for one in found:
        gained = one.difference.estimate
        yield (
            f"  {one.set}: {one.means[0]:.4f} (step {one.steps[0]}) and {one.means[1]:.4f} (step {one.steps[1]}), "
            f"difference {gained.mean:+.4f}, 95% interval {gained.low:+.4f} to {gained.high:+.4f}, "
            f"p = {one.difference.p_value:.4f} (paired t), {one.difference.p_value_signs:.4f} (sign flips), "
            f"{one.problems} problems"
        )
    yield from (f"  note: {note}" for note in notes)


def as_json(runs: tuple[Path, Path], found: list[Compared], notes: list[str]) -> dict[str, Any]:
    """The comparison as the page has it."""
    statuses = [read_status(run) for run in runs]
    return {
        "with": runs[1].resolve().name,
        "difference": [
            {
                "set": one.set,
                "a": one.means[0],
                "b": one.means[1],
                "step_a": one.steps[0],
                "step_b": one.steps[1],
                "problems": one.problems,
                **{name: _finite(value) for name, value in asdict(one.difference.estimate).items()},
                "p_value": one.difference.p_value,
                "p_value_signs": one.difference.p_value_signs,
            }
            for one in found
        ],
        "notes": notes,
        "dollars": [None if status is None else status.dollars for status in statuses],
        "hours": [None if status is None else status.seconds / 3600 for status in statuses],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinities, which bounds from a single problem are."""
    return value if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--with", type=Path, metavar="RUN", dest="other", help="another run, to compare it with")
    options = parser.parse_args()
    print("\n".join(report(options.run)))
    comparison = None
    if options.other is not None:
        list(report(options.other))  # its sentence, where it is no run
        found, notes = compare_runs(options.run, options.other), list(obstacles(options.run, options.other))
        print("\n".join(compared_lines((options.run.name, options.other.name), found, notes)))
        comparison = as_json((options.run, options.other), found, notes)
    with writing(options.run / FILE):
        atomic_write_text(options.run / FILE, html_report(options.run, options.other, comparison))
    print(f"  all of it to look at: {options.run / FILE}; live: make watch")


if __name__ == "__main__":
    run_main(main)
