"""Each likely cause of a mismatch between trainer and engines is recognised, and told once."""

import pytest

from recipe.grpo.mismatch import MismatchWatch, StepMismatch
from recipe.messages import SourceDifference, StepReport

LIMIT = 0.05


def step(older: float | None, *engines: float | None, beyond_10: float = 0.0) -> StepMismatch:
    """A rollout of 100 tokens a source, whose means are given, learned in two optimizer steps. All older tokens and a
    share of the engines' differ by more than a factor of 10."""

    def source(tokens: float, mean: float | None, far: float) -> SourceDifference:
        return (
            SourceDifference(0.0, 0, 0)
            if mean is None
            else SourceDifference(tokens * mean, int(tokens), int(tokens * far))
        )

    def report(share: float) -> StepReport:
        of_engines = [source(100 * share, mean, beyond_10) for mean in engines]
        return StepReport({}, False, (source(100 * share, older, 1.0), *of_engines))

    mismatch = StepMismatch.of([report(0.25), report(0.75)])
    assert mismatch is not None
    return mismatch


def test_means_are_over_tokens_not_over_steps() -> None:
    mismatch = step(0.5, 0.1, None, 0.3)
    assert mismatch.older == pytest.approx(0.5)
    assert mismatch.engines == (pytest.approx(0.1), None, pytest.approx(0.3))
    assert mismatch.current == pytest.approx(0.2)
    assert mismatch.current_without[0] == pytest.approx(0.3)


def test_what_is_small_is_not_told() -> None:
    watch = MismatchWatch(LIMIT)
    assert [watch.warnings(step(None, 0.02, 0.04)) for _ in range(5)] == [[]] * 5
    assert StepMismatch.of([]) is None


@pytest.mark.parametrize(
    ("mismatch", "sentence"),
    [
        (step(0.3, 0.01, 0.01), "tokens that older weights made differ by 0.300 nats"),
        (
            step(None, 0.01, 0.9, 0.01),
            "engine 1 disagrees with the trainer by 0.900 nats a token, the other",
        ),
        (step(None, 0.2, 0.2, beyond_10=0.08), "most of it at the 8.0% of tokens"),
        (step(0.01, 0.2, 0.2), "at many tokens a little: likely a temperature or a precision"),
        (step(None, 0.2, 0.2), "at many tokens a little: likely a temperature or a precision"),
        (step(None, 0.2), "at many tokens a little"),
    ],
)
def test_each_cause_is_named_alone_and_once(mismatch: StepMismatch, sentence: str) -> None:
    watch = MismatchWatch(LIMIT)
    [warning] = watch.warnings(mismatch)
    assert sentence in warning
    assert watch.warnings(mismatch) == []


def test_where_the_engine_is_replayed_its_routing_is_not_the_cause() -> None:
    cases = (
        (0.07, True, "though all tokens are taken to the engine's experts (a router would take 7.0%"),
        (0.52, True, "likely the engine tells the experts of other tokens; --no-use-rollout-routing-replay"),
        (0.52, False, "; --use-rollout-routing-replay takes tokens to the engine's"),
    )
    for elsewhere, replays_engine, sentence in cases:
        sources = SourceDifference(0.0, 0, 0), SourceDifference(20.0, 100, 8)
        report = StepReport({"routing_disagreement": elsewhere}, False, sources)
        mismatch = StepMismatch.of([report], replays_engine=replays_engine)
        assert mismatch is not None
        [warning] = MismatchWatch(LIMIT).warnings(mismatch)
        assert sentence in warning


def test_a_mismatch_that_has_risen_says_so() -> None:
    watch = MismatchWatch(LIMIT)
    for mean in (0.01, 0.02, 0.03):
        assert watch.warnings(step(None, mean, mean)) == []
    [warning] = watch.warnings(step(None, 0.06, 0.06))
    assert "by 0.060 nats a token, up from 0.010" in warning


def test_another_engine_is_another_cause() -> None:
    watch = MismatchWatch(LIMIT)
    assert "engine 0" in watch.warnings(step(None, 0.9, 0.01, 0.01))[0]
    assert "engine 2" in watch.warnings(step(None, 0.01, 0.01, 0.9))[0]
