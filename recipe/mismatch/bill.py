"""A difference of log-probs as a sum of parts.

Between the engine's log-prob of a token when it sampled it and the trainer's lie others of the same token, each
computed with one thing changed: what changes from one to the next is a part of the whole, token by token.

Letters: T trained tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

OLDER, DECODING, ENGINE, TRAINER, ROUTING = "older weights", "decoding", "engine", "trainer", "routing"

NEGLIGIBLE = 1e-4
"""Nats a token: what fp32 and its kernels leave is a hundredth of it, what bf16 does ten times as much."""
CURES: Mapping[str, str] = {
    OLDER: "--use-tis weighs such tokens, --mask-offpolicy-in-partial-rollout leaves them out",
    DECODING: "--sglang-enable-deterministic-inference computes a token alike in every batch; --speculative-max-batch "
    "bounds drafts; --use-tis bounds what such tokens do",
    ENGINE: "another --sglang-attention-backend or --sglang-enable-fp32-lm-head; --use-tis bounds what such tokens do",
    TRAINER: "--attention-backend unfused computes attention in fp32; --use-tis bounds what such tokens do",
    ROUTING: "--use-rollout-routing-replay takes tokens to the engine's experts",
}
"""What to turn, by the part."""


@dataclass(frozen=True)
class Part:
    """What one cause makes of the difference."""

    name: str
    what: str
    difference: Floats
    """[T] in nats; 0 at tokens that it has no part in."""


@dataclass(frozen=True)
class Row:
    """A part, or the whole, in figures."""

    name: str
    what: str
    mean: float
    """Mean |difference|, in nats a token."""
    p99: float
    """99th percentile of |difference|."""
    largest: float
    share: float
    """Of the KL between the two, which for small differences is half their mean square: sum(part x whole) /
    sum(whole^2). The shares of all parts add up to 1."""


@dataclass(frozen=True)
class Bill:
    """The parts of a difference, which add up to it."""

    whole: Row
    parts: tuple[Row, ...]

    @classmethod
    def of(cls, whole: Floats, parts: Sequence[Part]) -> "Bill":
        """Raises ValueError if the parts [T] do not add up to the whole [T]."""
        if not np.allclose(sum(part.difference for part in parts), whole, atol=1e-5):
            raise ValueError("the parts do not add up to the whole")
        square = float(whole @ whole)
        rows = (_row(part.name, part.what, part.difference, whole, square) for part in parts)
        return cls(_row("together", "the trainer less the engine", whole, whole, square), tuple(rows))

    @property
    def cheapest_cure(self) -> str | None:
        """A flag for the part that makes most of the KL; None where the difference is rounding."""
        if self.whole.mean < NEGLIGIBLE:
            return None
        return CURES[max(self.parts, key=lambda part: part.share).name]

    def lines(self) -> Iterator[str]:
        """As a terminal shows it."""
        yield f"{'':<14} {'mean':>9} {'99%':>9} {'largest':>9} {'of the KL':>10}"
        for row in (*self.parts, self.whole):
            figures = f"{row.mean:9.5f} {row.p99:9.5f} {row.largest:9.4f} {row.share:10.1%}"
            yield f"{row.name:<14} {figures}  {row.what}"


def _row(name: str, what: str, difference: Floats, whole: Floats, square: float) -> Row:
    size = np.abs(difference) if len(difference) else np.zeros(1)
    share = float(difference @ whole) / square if square else 0.0
    return Row(name, what, float(size.mean()), float(np.quantile(size, 0.99)), float(size.max()), share)
