"""How fast an engine was measured to generate, and what that makes of the planned figures.

E: moments of a rollout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from recipe.config import Architecture, Config
from recipe.config.sglang_rules import EngineLayout, size_of
from recipe.config.speculation_rules import DEFAULT_DRAFT_STEPS


@dataclass(frozen=True)
class EngineKind:
    """What an engine's speed hangs on, besides its load and its GPUs."""

    layers: int
    hidden_size: int
    experts: int
    tp: int
    pp: int
    groups: int
    """Of its GPUs that hold different sequences."""
    attention_backend: str | None
    """None: SGLang's own choice."""
    draft_steps: int
    """0: it does not draft."""

    @classmethod
    def of(cls, architecture: Architecture, config: Config) -> Self:
        layout, args = EngineLayout.of(config), config.sglang.args
        drafts = "speculative_algorithm" in args
        backend = args.get("attention_backend")
        return cls(
            layers=architecture.num_hidden_layers,
            hidden_size=architecture.hidden_size,
            experts=architecture.n_routed_experts,
            tp=layout.tp,
            pp=layout.pp,
            groups=layout.groups,
            attention_backend=None if backend is None else str(backend),
            draft_steps=size_of(config, "speculative_num_steps", default=DEFAULT_DRAFT_STEPS) if drafts else 0,
        )


@dataclass(frozen=True)
class DecodePoint:
    """How fast an engine generates at one load."""

    sequences: PositiveInt
    """At once, of the whole engine."""
    context: PositiveInt
    """Tokens before the one that is generated, on average."""
    seconds: PositiveFloat
    """In which every sequence gets a token more."""

    def __str__(self) -> str:
        point = f"{self.sequences:4} sequences, {self.context:6} tokens before"
        return f"{point}: {1e3 * self.seconds:7.2f} ms a token, {self.sequences / self.seconds:7,.0f} tokens/s"


@dataclass(frozen=True)
class MeasuredDecoding:
    """An engine under several loads."""

    engine: EngineKind
    accept_length: PositiveFloat
    """Tokens that a verification brought; without drafts 1."""
    points: tuple[DecodePoint, ...]

    def ratio(self, planned: Callable[[int, int], float], sequences: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] measured seconds over those that are planned for (sequences, context), at [E] sequences of a group with
        [E] tokens before them: between the points by the logarithms of both, beyond them as at the nearest."""
        contexts = sorted({point.context for point in self.points})
        at_each = []
        for one in contexts:
            points = sorted((p for p in self.points if p.context == one), key=lambda point: point.sequences)
            loads = np.log([point.sequences / self.engine.groups for point in points])
            ratios = [point.seconds / planned(point.sequences, point.context) for point in points]
            at_each.append(np.interp(np.log(np.maximum(1, sequences)), loads, ratios))
        place = np.interp(np.log(np.maximum(1, context)), np.log(contexts), np.arange(len(contexts)))
        below = np.minimum(place.astype(np.int64), len(contexts) - 1)
        above = np.minimum(below + 1, len(contexts) - 1)
        table, column = np.array(at_each), np.arange(len(place))
        share = place - below
        return (1 - share) * table[below, column] + share * table[above, column]
