"""Why trainer and engine may give one token two probabilities, told once for each likely cause."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipe.messages import OLDER_TOKENS, SourceDifference, StepReport

OUTLIER = 3.0
"""An engine whose tokens differ so many times as much as the other engines' is a case of its own."""
RISE = 2.0
"""Differences that are so many times the least of the earlier steps have risen."""
MISTOLD = 0.25
"""Share of the tokens whose replayed experts no difference between routers explains: 0.05 where they are theirs, 0.5
where one of two groups of GPUs told those of others' tokens (docs/evidence.md)."""


@dataclass(frozen=True)
class StepMismatch:
    """|trainer's log-prob - engine's| of one rollout's tokens, in nats: means, None where there are no tokens."""

    older: float | None
    """Difference at tokens that older weights made."""
    engines: tuple[float | None, ...]
    """Difference at the other tokens, by engine."""
    current: float | None
    """Difference at the other tokens, over all engines."""
    current_without: tuple[float | None, ...]
    """Difference at the other tokens without those of one engine, by engine."""
    beyond_10: float
    """Share of the tokens of `current` whose two probabilities differ by more than a factor of 10."""
    rerouted: float | None = None
    """Share of the tokens that a router of the trainer would take elsewhere than the engine did, mean over layers;
    None where the engine's routing is not replayed."""

    @classmethod
    def of(cls, reports: Sequence[StepReport], *, replays_engine: bool = False) -> "StepMismatch | None":
        """From the optimizer steps on a rollout; None where it was not measured."""
        if not reports or not all(report.by_source for report in reports):
            return None
        sources = [_added(of_one) for of_one in zip(*(report.by_source for report in reports), strict=True)]
        engines = sources[OLDER_TOKENS + 1 :]
        return cls(
            older=_mean([sources[OLDER_TOKENS]]),
            engines=tuple(_mean([engine]) for engine in engines),
            current=_mean(engines),
            current_without=tuple(_mean([*engines[:n], *engines[n + 1 :]]) for n in range(len(engines))),
            beyond_10=_added(engines).beyond_10 / max(1, _added(engines).tokens),
            rerouted=reports[0].metrics.get("routing_disagreement") if replays_engine else None,
        )


class MismatchWatch:
    """Looks at the mismatch of every step. `limit` is the mean difference above which something is wrong."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._least = math.inf
        self._told: set[str] = set()

    def warnings(self, mismatch: StepMismatch) -> list[str]:
        """Sentences on causes that were not told before."""
        found = list(self._causes(mismatch))
        if mismatch.current is not None:
            self._least = min(self._least, mismatch.current)
        new = [sentence for cause, sentence in found if cause not in self._told]
        self._told.update(cause for cause, _ in found)
        return new

    def _causes(self, mismatch: StepMismatch) -> Iterator[tuple[str, str]]:
        if mismatch.older is not None and mismatch.older > self._limit:
            yield (
                "older",
                f"tokens that older weights made differ by {mismatch.older:.3f} nats from what the current ones give "
                "them: --partial-rollout and --async-rollout train off-policy; --use-tis weighs such tokens, "
                "--mask-offpolicy-in-partial-rollout leaves them out, a lower --max-staleness makes fewer",
            )
        rest = mismatch.current
        for engine, difference in enumerate(mismatch.engines):
            others = mismatch.current_without[engine]
            if difference is None or others is None or difference <= max(self._limit, OUTLIER * others):
                continue
            rest = others
            yield (
                f"engine {engine}",
                f"engine {engine} disagrees with the trainer by {difference:.3f} nats a token, the other engines by "
                f"{others:.3f}: its weights are stale or damaged, though it reports the right version; look at its log",
            )
        if rest is not None and rest > self._limit:
            yield self._everywhere(rest, mismatch)

    def _everywhere(self, difference: float, mismatch: StepMismatch) -> tuple[str, str]:
        what = f"trainer and engines disagree by {difference:.3f} nats a token"
        if mismatch.rerouted is not None and mismatch.rerouted > MISTOLD:
            return "mistold", (
                f"{what}, and a router would take {mismatch.rerouted:.1%} of the tokens elsewhere than the engine says "
                "that it did: likely the engine tells the experts of other tokens; --no-use-rollout-routing-replay "
                "does without"
            )
        if difference > RISE * self._least:
            return "rising", (
                f"{what}, up from {self._least:.3f}: likely a part of the weights never reaches the engines (a router "
                "that keeps its first weights, a tensor that is not sent), or the policy grows sharper than the "
                "engine's precision can follow"
            )
        if mismatch.beyond_10 * math.log(10) > difference / 2:
            few = (
                f"{what}, most of it at the {mismatch.beyond_10:.1%} of tokens whose probabilities differ by more than "
                "a factor of 10"
            )
            if mismatch.rerouted is not None:
                return "few", (
                    f"{few}, though all tokens are taken to the engine's experts (a router would take "
                    f"{mismatch.rerouted:.1%} of them elsewhere): likely the engine's precision or its kernels; "
                    "--use-tis bounds what such tokens do"
                )
            return "few", (
                f"{few}: likely experts that are chosen differently in the engine's precision, or its kernels; "
                "--use-rollout-routing-replay takes tokens to the engine's, --use-tis bounds what such tokens do"
            )
        return "everywhere", (
            f"{what}, at many tokens a little: likely a temperature or a precision that is not the trainer's, or "
            "another checkpoint than the one that is trained"
        )


def _added(differences: Sequence[SourceDifference]) -> SourceDifference:
    return SourceDifference(
        sum(one.total for one in differences),
        sum(one.tokens for one in differences),
        sum(one.beyond_10 for one in differences),
    )


def _mean(differences: Sequence[SourceDifference]) -> float | None:
    whole = _added(differences)
    return whole.total / whole.tokens if whole.tokens else None
