"""From verdicts to scores: what in-loop evaluation and `evaluation.aime` have in common."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.grading import Judgement, Verdict
from evaluation.problems import text_sha256
from evaluation.result import (
    Interval,
    ProblemResult,
    Result,
    SampleResult,
    Score,
    Settings,
    Tokens,
    score_notes,
)
from evaluation.sampling import Plan, SampleKey, SampleStore, StoredSample
from recipe.data.prompts import Prompt
from recipe.run.statistics import (
    Estimate,
    bootstrap_share,
    clustered_share,
    majority_at_k,
    pass_at_k,
    powers_of_two,
)

_RIGHT = "\0"
"""Stands for all spellings of the right answer in a vote."""


@dataclass(frozen=True)
class Judged:
    """A sample as far as scores depend on it."""

    judgement: Judgement
    tokens: int
    """Tokens of the response."""
    truncated: bool
    """The engine cut it off."""


def score(problems: Sequence[Sequence[Judged]], seed: int) -> Score:
    """The score of [P] problems, each of the same number of samples. `seed` is that of the bootstrap."""
    count = len(problems[0])
    votes = [_votes(samples) for samples in problems]
    correct = [tally[_RIGHT] for tally in votes]
    shares = [right / count for right in correct]
    samples = [sample for of_problem in problems for sample in of_problem]
    verdicts = Counter(sample.judgement.verdict for sample in samples)

    def at_each_k(estimate: Callable[[int, int], float]) -> dict[int, Interval]:
        return {
            k: _interval(clustered_share([estimate(number, k) for number in range(len(problems))]))
            for k in powers_of_two(count)
        }

    return Score(
        problems=len(problems),
        samples=len(samples),
        avg_at_n=_interval(clustered_share(shares)),
        avg_at_n_bootstrap=_interval(bootstrap_share(shares, seed)),
        pass_at=at_each_k(lambda number, k: pass_at_k(count, correct[number], k)),
        maj_at=at_each_k(lambda number, k: _majority(votes[number], count, k)),
        verdicts={verdict: verdicts[verdict] for verdict in Verdict},
        truncated_share=sum(sample.truncated for sample in samples) / len(samples),
        no_answer_share=verdicts[Verdict.NO_ANSWER] / len(samples),
        grader_failed_share=verdicts[Verdict.GRADER_FAILED] / len(samples),
        tokens=_tokens([sample.tokens for sample in samples]),
    )


def result_of(settings: Settings, plan: Plan, store: SampleStore, judgements: Mapping[SampleKey, Judgement]) -> Result:
    """The result of a complete set of samples."""
    of_problems = [[store.samples[problem.name, n] for n in range(plan.n_samples)] for problem in plan.problems]
    judged = [
        [Judged(judgements[sample.key], sample.tokens, sample.truncated) for sample in samples]
        for samples in of_problems
    ]
    found = score(judged, settings.sampling.seed)
    return Result(
        settings=settings,
        notes=score_notes(settings, found.truncated_share, found.verdicts[Verdict.GRADER_FAILED]),
        score=found,
        problems=tuple(map(_problem_result, plan.problems, of_problems, judged)),
    )


def _problem_result(problem: Prompt, samples: Sequence[StoredSample], judged: Sequence[Judged]) -> ProblemResult:
    return ProblemResult(
        id=problem.name,
        label=problem.label,
        prompt=problem.text,
        prompt_sha256=text_sha256(problem.text),
        correct_share=_votes(judged)[_RIGHT] / len(judged),
        majority=majority_answer(judged, problem.label),
        mean_tokens=sum(sample.tokens for sample in samples) / len(samples),
        samples=tuple(
            SampleResult(
                sample=sample.sample,
                seed=sample.seed,
                verdict=one.judgement.verdict,
                answer=one.judgement.answer,
                reason=one.judgement.reason,
                finish_reason=sample.finish_reason,
                tokens=sample.tokens,
            )
            for sample, one in zip(samples, judged, strict=True)
        ),
    )


def majority_answer(samples: Sequence[Judged], label: str) -> str | None:
    """The commonest answer, the first of several; None where nobody gave one."""
    votes = _votes(samples).most_common(1)
    if not votes:
        return None
    return label if votes[0][0] == _RIGHT else votes[0][0]


def _votes(samples: Sequence[Judged]) -> Counter[str]:
    """How often each answer was given; all spellings of a value are one answer, of wrong ones as of the right one."""
    votes: Counter[str] = Counter()
    for sample in samples:
        judgement = sample.judgement
        if judgement.verdict is Verdict.CORRECT:
            votes[_RIGHT] += 1
        elif judgement.answer is not None:
            votes[judgement.answer if judgement.value is None else judgement.value] += 1
    return votes


def _majority(votes: Counter[str], count: int, k: int) -> float:
    others = [given for answer, given in votes.items() if answer != _RIGHT]
    return majority_at_k(votes[_RIGHT], others, count - votes.total(), k)


def _tokens(lengths: Sequence[int]) -> Tokens:
    p50, p99 = np.quantile(lengths, [0.5, 0.99])
    return Tokens(mean=float(np.mean(lengths)), p50=float(p50), p99=float(p99), max=max(lengths))


def _interval(estimate: Estimate) -> Interval:
    return Interval(mean=estimate.mean, ci95=(estimate.low, estimate.high))
