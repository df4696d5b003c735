"""How fast an engine was measured to generate, and what that makes of the planned figures.

E: moments of a rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DecodePoint:
    """How fast an engine generates at one load."""

    sequences: int
    """At once, of the whole engine."""
    context: int
    """Tokens before the one that is generated, on average."""
    seconds: float
    """In which every sequence gets a token more."""

    def __str__(self) -> str:
        point = f"{self.sequences:4} sequences, {self.context:6} tokens before"
        return f"{point}: {1e3 * self.seconds:7.2f} ms a token, {self.sequences / self.seconds:7,.0f} tokens/s"


@dataclass(frozen=True)
class MeasuredDecoding:
    """An engine of the recipe's model with random weights, under several loads."""

    gpus: int
    groups: int
    """Of its GPUs that hold different sequences."""
    accept_length: float | None
    """Tokens that a verification brought; None: it did not draft."""
    points: tuple[DecodePoint, ...]

    @property
    def kind(self) -> tuple[int, int, bool]:
        """GPUs, groups, and whether it drafted."""
        return self.gpus, self.groups, self.accept_length is not None

    def ratio(self, planned: Callable[[int, int], float], sequences: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] measured seconds over those that are planned for (sequences, context), at [E] sequences of a group with
        [E] tokens before them: between the points by the logarithms of both, beyond them as at the nearest."""
        contexts = sorted({point.context for point in self.points})
        at_each = []
        for one in contexts:
            points = sorted((p for p in self.points if p.context == one), key=lambda point: point.sequences)
            loads = np.log([point.sequences / self.groups for point in points])
            ratios = [point.seconds / planned(point.sequences, point.context) for point in points]
            at_each.append(np.interp(np.log(np.maximum(1, sequences)), loads, ratios))
        place = np.interp(np.log(np.maximum(1, context)), np.log(contexts), np.arange(len(contexts)))
        below = np.minimum(place.astype(np.int64), len(contexts) - 1)
        above = np.minimum(below + 1, len(contexts) - 1)
        table, column = np.array(at_each), np.arange(len(place))
        share = place - below
        return (1 - share) * table[below, column] + share * table[above, column]
