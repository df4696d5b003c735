"""The embedded engine's forward pass is transformers', whatever the sizes of the model."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rollout_support import CONTEXT, load_reference, make_checkpoint, weights_of

from recipe.config import Architecture
from recipe.engines.embedded.forward import CHUNK, RowModel
from recipe.engines.embedded.fused import FusedModel
from recipe.engines.embedded.weights import WeightTable

OTHER_HEADS: Mapping[str, object] = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
OTHER_EXPERTS: Mapping[str, object] = {
    "hidden_size": 36,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 0.7,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 2,
    "mlp_layer_types": ["dense", "dense", "sparse"],
}


@pytest.mark.parametrize("changes", [{}, OTHER_HEADS, OTHER_EXPERTS])
@torch.inference_mode()
def test_the_logits_are_those_of_transformers(changes: Mapping[str, object], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", seed=5, changes=changes)
    fused = FusedModel(Architecture.from_checkpoint(folder))
    WeightTable(fused).replace_all(folder)
    model = RowModel(fused, CONTEXT)
    tokens_RQ = torch.randint(model.vocab_size, (2, 3 * CHUNK), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    read = [
        model.logits(model.forward(chunk, torch.full((2,), number * CHUNK), cache, first_row=0))
        for number, chunk in enumerate(tokens_RQ.split(CHUNK, dim=1))
    ]
    expected = load_reference(folder)(tokens_RQ).logits
    assert torch.allclose(torch.cat(read, dim=1).log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_every_weight_has_a_place_of_its_own(tmp_path: Path) -> None:
    """What one is given, no other has; those of the layer for multi-token prediction are not the engine's."""
    folder = make_checkpoint(tmp_path / "hf", seed=5, changes=OTHER_EXPERTS)
    fused = FusedModel(Architecture.from_checkpoint(folder))
    mtp = f"model.layers.{OTHER_EXPERTS['num_hidden_layers']}."
    weights = {name: tensor for name, tensor in weights_of(folder).items() if not name.startswith(mtp)}
    assert fused.parts.keys() == weights.keys()
    WeightTable(fused).replace_all(folder)
    for name, tensor in weights.items():
        assert torch.equal(fused.parts[name], tensor), name
