"""What a sequence costs this architecture to train on."""

from recipe.batching.cost import SequenceCost
from recipe.config import Architecture
from recipe.weights.table import placements


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
