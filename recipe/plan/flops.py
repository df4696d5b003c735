"""FLOPs that a sequence costs this architecture to train on."""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from recipe.config import Architecture
from recipe.weights.table import placements

Length = TypeVar("Length", float, np.ndarray)


@dataclass(frozen=True)
class SequenceCost:
    """FLOPs of forward and backward over one sequence, as `linear * length + quadratic * length**2`."""

    linear: float
    quadratic: float

    def __call__(self, length: Length) -> Length:
        """FLOPs of a sequence of so many tokens, or of each of many."""
        return self.linear * length + self.quadratic * length * length

    @classmethod
    def of_transformer(
        cls, *, active_parameters: float, num_layers: int, num_heads: int, qk_head_dim: int, v_head_dim: int
    ) -> "SequenceCost":
        """The cost for a causal transformer; the backward pass costs twice the forward pass.

        Linear: 2 FLOPs a forward pass for each parameter that a token meets, the output head included. Quadratic:
        scores and their weighted sum, half of the square being masked (PaLM: arXiv:2204.02311, appendix B, halved).
        """
        return cls(linear=6 * active_parameters, quadratic=3 * num_layers * num_heads * (qk_head_dim + v_head_dim))


@cache
def active_parameters(architecture: Architecture) -> int:
    """Parameters of the main model that a token meets, the output head included and the embedding not."""
    total = 0
    for placement in placements(architecture, with_mtp=False).values():
        size = placement.elements
        if placement.is_expert:
            size = size * architecture.num_experts_per_tok // architecture.n_routed_experts
        total += size
    return total - architecture.vocab_size * architecture.hidden_size


def sequence_cost(architecture: Architecture) -> SequenceCost:
    """FLOPs of a forward and backward pass by sequence length."""
    return SequenceCost.of_transformer(
        active_parameters=active_parameters(architecture),
        num_layers=architecture.num_hidden_layers,
        num_heads=architecture.num_attention_heads,
        qk_head_dim=architecture.qk_nope_head_dim + architecture.qk_rope_head_dim,
        v_head_dim=architecture.v_head_dim,
    )
