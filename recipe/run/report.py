"""What a run achieved and where its time went, on a terminal: python -m recipe.run.report runs/NAME"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipe.run.metrics import shown
from recipe.system.errors import UserError, run_main
from recipe.system.json_text import read_json


def report(directory: Path) -> Iterator[str]:
    """The lines of the report. Raises UserError if there is no run that has ended."""
    path = directory / "summary.json"
    if not path.is_file():
        raise UserError(f"{path} is not there: {directory} is no run, or one that has not ended yet")
    summary = read_json(path, dict[str, Any], "go on with the run by --load, which writes it anew")
    yield f"{directory}: {summary['outcome']}, {summary['steps']} steps in {summary['wall_s']:.0f} s"
    for name, scores in summary["eval"]["sets"].items():
        yield f"  {name}: {_score(scores, 'before')} before, {_score(scores, 'after')} after"
    if last := summary["last_step"]:
        yield f"  last step: {', '.join(shown(last))}"
    total = sum(summary["seconds"].values()) - summary["seconds"].get("step", 0.0)
    for phase, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1]):
        if phase != "step" and total:
            yield f"  {phase:>16} {seconds:9.1f} s {seconds / total:6.1%}"
    yield f"  pictures and samples: {directory}/reward.png, tensorboard/, rollouts/"


def _score(scores: Mapping[str, Any], moment: str) -> str:
    if scores[moment] is None:
        return "not scored"
    low, high = scores[f"{moment}_ci95"]
    return f"{scores[moment]:.4f} [{low:.4f}, {high:.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory")
    print("\n".join(report(parser.parse_args().run)))


if __name__ == "__main__":
    run_main(main)
