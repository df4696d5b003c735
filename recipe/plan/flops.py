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
    whole = _met_by_a_token(architecture, with_mtp=False)
    return whole - architecture.vocab_size * architecture.hidden_size


@cache
def mtp_parameters(architecture: Architecture) -> int:
    """Parameters of the MTP layer that a token meets; it has the main model's embedding and output head."""
    return _met_by_a_token(architecture, with_mtp=True) - _met_by_a_token(architecture, with_mtp=False)


def _met_by_a_token(architecture: Architecture, *, with_mtp: bool) -> int:
    """Parameters of all experts in the share that it is sent to, of all else whole."""
    total = 0
    for placement in placements(architecture, with_mtp).values():
        size = placement.elements
        if placement.is_expert:
            size = size * architecture.num_experts_per_tok // architecture.n_routed_experts
        total += size
    return total


def sequence_cost(architecture: Architecture, *, trains_mtp: bool = False) -> SequenceCost:
    """FLOPs of a forward and backward pass by sequence length. An MTP layer that is trained is one layer more; of the
    output head, which it does not train, it takes two products of three."""
    head = architecture.vocab_size * architecture.hidden_size
    further = mtp_parameters(architecture) + head * 2 / 3 if trains_mtp else 0.0
    return SequenceCost.of_transformer(
        active_parameters=active_parameters(architecture) + further,
        num_layers=architecture.num_hidden_layers + trains_mtp,
        num_heads=architecture.num_attention_heads,
        qk_head_dim=architecture.qk_nope_head_dim + architecture.qk_rope_head_dim,
        v_head_dim=architecture.v_head_dim,
    )
