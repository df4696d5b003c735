"""Checksums of tensors by the names that SGLang tells them by."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from recipe.config import Architecture
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.tensor import NamedTensor
from recipe.weights.table import placements
from recipe.weights.tiny import tiny_config

with tempfile.TemporaryDirectory() as _folder:
    (Path(_folder) / "config.json").write_text(json.dumps(tiny_config(128, [2], 0)))
    ARCHITECTURE = Architecture.from_checkpoint(Path(_folder))
DECODER = "draft.model.decoder"
OF_SGLANGS_DRAFT = {
    "draft.lm_head.weight",
    "draft.model.embed_tokens.weight",
    "draft.model.enorm.weight",
    "draft.model.hnorm.weight",
    "draft.model.eh_proj.weight",
    "draft.model.shared_head.norm.weight",
    f"{DECODER}.input_layernorm.weight",
    f"{DECODER}.post_attention_layernorm.weight",
    f"{DECODER}.self_attn.fused_qkv_a_proj_with_mqa.weight",
    f"{DECODER}.self_attn.q_a_layernorm.weight",
    f"{DECODER}.self_attn.q_b_proj.weight",
    f"{DECODER}.self_attn.kv_a_layernorm.weight",
    f"{DECODER}.self_attn.kv_b_proj.weight",
    f"{DECODER}.self_attn.o_proj.weight",
    f"{DECODER}.mlp.gate.weight",
    f"{DECODER}.mlp.gate.e_score_correction_bias",
    f"{DECODER}.mlp.experts.w13_weight",
    f"{DECODER}.mlp.experts.w2_weight",
    f"{DECODER}.mlp.shared_experts.gate_up_proj.weight",
    f"{DECODER}.mlp.shared_experts.down_proj.weight",
}
"""As SGLang 0.5.17 told them on a GPU, of EAGLE by the MTP layer."""


def weights(*, with_mtp: bool) -> list[NamedTensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, torch.randn(entry.hf_shape, generator=generator))
        for entry in placements(ARCHITECTURE, with_mtp).values()
        for name in entry.hf_names
    ]


def checksums(passing: list[NamedTensor]) -> ExpectedChecksums:
    found = ExpectedChecksums(ARCHITECTURE.num_hidden_layers, ARCHITECTURE.n_routed_experts)
    for name, tensor in passing:
        found.add(name, tensor)
    return found


def engine(passing: list[NamedTensor]) -> dict[int, dict[str, str]]:
    """The checksums of an engine of one GPU that holds these tensors and drafts."""
    return checksums(passing).with_draft()


def test_a_draft_models_tensors_have_sglangs_names() -> None:
    names = set(engine(weights(with_mtp=True))[0])
    assert {name for name in names if name.startswith("draft.")} == OF_SGLANGS_DRAFT


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj.weight"]),
        ("lm_head", ["draft.lm_head.weight", "lm_head.weight"]),
        (f"layers.{ARCHITECTURE.num_hidden_layers}.eh_proj", ["draft.model.eh_proj.weight"]),
        (f"layers.{ARCHITECTURE.num_hidden_layers}.mlp.experts.1.up_proj", [f"{DECODER}.mlp.experts.w13_weight"]),
    ],
)
def test_a_tensor_that_is_another_is_named(changed: str, named: list[str]) -> None:
    sent = weights(with_mtp=True)
    held = [(name, tensor + 1 if changed in name else tensor) for name, tensor in sent]
    assert checksums(sent).compare(engine(sent)).differing == []
    assert checksums(sent).compare(engine(held)).differing == named


def test_a_draft_model_that_is_not_trained_is_not_compared() -> None:
    trained = checksums(weights(with_mtp=False))
    held = engine(weights(with_mtp=True))
    assert trained.compare(held).differing == []
    assert trained.compare({0: held[0] | {"draft.lm_head.weight": "stale"}}).differing == ["draft.lm_head.weight"]


def test_an_engine_that_does_not_draft_has_the_policy_alone() -> None:
    sent = checksums(weights(with_mtp=True))
    assert sent.compare({0: sent.result()}).differing == []
    assert sent.compare({0: sent.result() | {"model.more": "1"}}).differing == ["model.more"]


def test_a_router_may_be_held_in_float32() -> None:
    """As SGLang 0.5.21 does in a bfloat16 engine, and 0.5.17 does not."""
    sent = [(name, tensor.bfloat16()) for name, tensor in weights(with_mtp=True)]
    router = "model.layers.2.mlp.gate.weight"
    in_float32 = [(name, tensor.float() if name == router else tensor) for name, tensor in sent]
    rounded = [(name, tensor.half() if name == router else tensor) for name, tensor in sent]
    assert checksums(sent).compare(engine(sent)).differing == []
    assert checksums(sent).compare(engine(in_float32)).differing == []
    assert checksums(sent).compare(engine(rounded)).differing == [router]
