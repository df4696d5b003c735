"""report.html: a result to look at, in one file that needs no network and no script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from evaluation.grading import Verdict
from evaluation.result import Interval, ProblemResult, Result, SampleResult
from evaluation.sampling import SampleKey, StoredSample

SHOWN_CHARACTERS = 100_000
"""Longest text shown whole: of a longer response only beginning and end are shown, half of this each; samples.jsonl has
all of it."""

_MISSED = (Verdict.WRONG, Verdict.TRUNCATED, Verdict.NO_ANSWER, Verdict.GRADER_FAILED)
_BINS = 24
_environment = Environment(
    loader=PackageLoader("evaluation", "templates"),
    autoescape=select_autoescape(default=True, default_for_string=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class ShownSample:
    """A sample in the report."""

    problem: ProblemResult
    sample: SampleResult
    beginning: str
    left_out: int
    """Characters between beginning and end."""
    end: str

    @property
    def anchor(self) -> str:
        return f"p{self.problem.id}-s{self.sample.sample}"


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram of lengths: tokens from `low` to `high`, and how many samples of each verdict."""

    low: float
    high: float
    counts: Mapping[Verdict, int]


def render_report(result: Result, samples: Mapping[SampleKey, StoredSample]) -> str:
    """The HTML of a result with its responses."""
    shown = [
        _shown(problem, sample, samples[problem.id, sample.sample].response)
        for problem in result.problems
        for sample in problem.samples
    ]
    shown.sort(key=lambda item: (*_MISSED, Verdict.CORRECT).index(item.sample.verdict))
    return _environment.get_template("report.html.j2").render(
        result=result,
        score=result.score,
        sampling=result.settings.sampling,
        verdicts=(Verdict.CORRECT, *_MISSED),
        problems=sorted(result.problems, key=lambda problem: problem.correct_share),
        counts={problem.id: _counts(problem.samples) for problem in result.problems},
        samples=shown,
        bars=_bars([sample for problem in result.problems for sample in problem.samples]),
        percent=_percent,
        interval=_interval,
    )


def _shown(problem: ProblemResult, sample: SampleResult, response: str) -> ShownSample:
    half = SHOWN_CHARACTERS // 2
    if len(response) <= SHOWN_CHARACTERS:
        return ShownSample(problem, sample, response, 0, "")
    return ShownSample(problem, sample, response[:half], len(response) - 2 * half, response[-half:])


def _counts(samples: Sequence[SampleResult]) -> dict[Verdict, int]:
    return {verdict: sum(sample.verdict is verdict for sample in samples) for verdict in Verdict}


def _bars(samples: Sequence[SampleResult]) -> list[Bar]:
    edges = np.linspace(0, max(1, *(sample.tokens for sample in samples)), _BINS + 1)
    places = np.clip(np.searchsorted(edges, [sample.tokens for sample in samples], side="left") - 1, 0, _BINS - 1)
    return [
        Bar(
            float(edges[number]),
            float(edges[number + 1]),
            _counts([sample for sample, place in zip(samples, places, strict=True) if place == number]),
        )
        for number in range(_BINS)
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(value: Interval) -> str:
    return f"{_percent(value.mean)} [{_percent(value.ci95[0])}, {_percent(value.ci95[1])}]"
