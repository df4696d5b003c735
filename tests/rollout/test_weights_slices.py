"""What each rank of an engine holds, against what SGLang's loaders do rank by rank, and against the plan's bytes."""

import hashlib
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from config_support import GLM_4_7_FLASH
from numpy.typing import NDArray
from test_weights_checksum import ARCHITECTURE, weights
from torch import Tensor

from recipe.config import resolve, sglang_rules
from recipe.config.loading import shipped_recipes
from recipe.config.sglang_rules import EngineLayout
from recipe.plan.engine import EngineEstimate
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.slices import slices
from recipe.weights.table import placements

LAYOUTS = {
    "one GPU": EngineLayout(),
    "tensor": EngineLayout(tp=4),
    "DP attention and experts": EngineLayout(
        tp=4, dp=4, ep=4, dp_attention=True, dp_lm_head=True, whole_dense_mlp=True
    ),
    "two DP groups, experts in halves": EngineLayout(tp=4, dp=2, ep=2, dp_attention=True),
    "redundant experts": EngineLayout(tp=2, ep=2, redundant_experts=4),
    "sent by a backend": EngineLayout(tp=2, ep=2, whole_shared_experts=True),
}
Weights = dict[str, Tensor]
Take = Callable[[str], Tensor]
Place = tuple[int, int]
"""A rank and the number of ranks."""


class Rank:
    """The place of one of SGLang's processes, by the formulas of its `parallel_state` and `dp_attention`."""

    def __init__(self, rank: int, layout: EngineLayout) -> None:
        self.layout = layout
        self.tensor = (rank, layout.tp)
        attention_size = layout.tp // (layout.dp if layout.dp_attention else 1)
        self.attention = (rank % attention_size, attention_size)
        expert_size = layout.tp // layout.ep
        self.experts_rank, self.expert = rank // expert_size, (rank % expert_size, expert_size)
        self.dense = (0, 1) if layout.whole_dense_mlp else self.tensor
        self.shared = (0, 1) if layout.whole_shared_experts else self.tensor

    def holds(self, full: Weights) -> Weights:
        """All its tensors by SGLang's names, built one by one from the whole checkpoint."""
        held = {
            "model.embed_tokens.weight": vocabulary(full["model.embed_tokens.weight"], self.attention),
            "lm_head.weight": vocabulary(
                full["lm_head.weight"], self.attention if self.layout.dp_lm_head else self.tensor
            ),
            "model.norm.weight": full["model.norm.weight"],
        }
        last = ARCHITECTURE.num_hidden_layers
        for number in range(last):
            held |= self._layer(full, f"model.layers.{number}", f"model.layers.{number}")
        held |= {f"draft.{name}": held[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        held |= self._layer(full, f"model.layers.{last}", "draft.model.decoder")
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
            held[f"draft.model.{name}.weight"] = full[f"model.layers.{last}.{name}.weight"]
        return held

    def _layer(self, full: Weights, source: str, target: str) -> Weights:
        def take(name: str) -> Tensor:
            return full[f"{source}.{name}.weight"]

        held = {name: take(name) for name in ("input_layernorm", "post_attention_layernorm")}
        held |= {f"self_attn.{name}": take(f"self_attn.{name}") for name in ("q_a_layernorm", "kv_a_layernorm")}
        a_projs = [take("self_attn.q_a_proj"), take("self_attn.kv_a_proj_with_mqa")]
        held["self_attn.fused_qkv_a_proj_with_mqa"] = torch.cat(a_projs)
        for name in ("q_b_proj", "kv_b_proj"):
            held[f"self_attn.{name}"] = shard(take(f"self_attn.{name}"), 0, self.attention)
        held["self_attn.o_proj"] = shard(take("self_attn.o_proj"), 1, self.attention)
        if f"{source}.mlp.gate.weight" in full:
            held["mlp.gate"] = take("mlp.gate")
            held |= _mlp("mlp.shared_experts", take, self.shared)
        else:
            held |= _mlp("mlp", take, self.dense)
        named = {f"{target}.{name}.weight": tensor for name, tensor in held.items()}
        if "mlp.gate" in held:
            named[f"{target}.mlp.gate.e_score_correction_bias"] = full[f"{source}.mlp.gate.e_score_correction_bias"]
            named |= {f"{target}.mlp.experts.{name}": tensor for name, tensor in self._experts(take).items()}
        return named

    def _experts(self, take: Take) -> Weights:
        logical = list(range(ARCHITECTURE.n_routed_experts))
        physical = logical + [i % len(logical) for i in range(self.layout.redundant_experts)]
        count = len(physical) // self.layout.ep
        mine = physical[self.experts_rank * count : (self.experts_rank + 1) * count]
        first, second = [], []
        for expert in mine:
            both = [shard(take(f"mlp.experts.{expert}.{side}_proj"), 0, self.expert) for side in ("gate", "up")]
            first.append(torch.cat(both))
            second.append(shard(take(f"mlp.experts.{expert}.down_proj"), 1, self.expert))
        return {"w13_weight": torch.stack(first), "w2_weight": torch.stack(second)}


def _mlp(name: str, take: Take, place: Place) -> Weights:
    both = [shard(take(f"{name}.{side}_proj"), 0, place) for side in ("gate", "up")]
    return {f"{name}.gate_up_proj": torch.cat(both), f"{name}.down_proj": shard(take(f"{name}.down_proj"), 1, place)}


def shard(tensor: Tensor, axis: int, place: Place) -> Tensor:
    rank, size = place
    length = tensor.shape[axis] // size
    return tensor.narrow(axis, rank * length, length)


def vocabulary(tensor: Tensor, place: Place) -> Tensor:
    padded = torch.zeros(math.ceil(len(tensor) / 64) * 64, tensor.shape[1])
    padded[: len(tensor)] = tensor
    return shard(padded, 0, place)


def told(full: Weights, layout: EngineLayout) -> dict[int, dict[str, str]]:
    """The checksums that an engine with these weights tells."""
    return {
        rank: {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
            for name, tensor in Rank(rank, layout).holds(full).items()
        }
        for rank in range(layout.tp)
    }


def sent(full: Weights, layout: EngineLayout) -> ExpectedChecksums:
    checksums = ExpectedChecksums(ARCHITECTURE.num_hidden_layers, ARCHITECTURE.n_routed_experts, layout)
    assert list(checksums.watch(full.items())) == list(full.items())
    return checksums


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank_holds_what_sglangs_loaders_put_there(layout: EngineLayout) -> None:
    full = dict(weights(with_mtp=True))
    engine = told(full, layout)
    comparison = sent(full, layout).compare(engine)
    assert comparison.differing == []
    assert comparison.compared == sum(map(len, engine.values()))


@pytest.mark.parametrize(
    ("name", "row", "tensor", "ranks"),
    [
        ("model.layers.1.self_attn.q_b_proj.weight", 0, "model.layers.1.self_attn.q_b_proj.weight", (0, 2)),
        ("model.layers.1.self_attn.q_b_proj.weight", -1, "model.layers.1.self_attn.q_b_proj.weight", (1, 3)),
        ("model.layers.0.mlp.up_proj.weight", -1, "model.layers.0.mlp.gate_up_proj.weight", (3,)),
        ("model.layers.2.mlp.experts.0.up_proj.weight", 0, "model.layers.2.mlp.experts.w13_weight", (0,)),
        ("model.layers.2.mlp.experts.7.gate_proj.weight", -1, "model.layers.2.mlp.experts.w13_weight", (3,)),
        ("model.layers.2.mlp.experts.7.down_proj.weight", 0, "model.layers.2.mlp.experts.w2_weight", (2, 3)),
        ("model.layers.3.mlp.gate.weight", 0, "model.layers.3.mlp.gate.weight", (0, 1, 2, 3)),
    ],
)
def test_a_slice_that_is_another_is_named_with_its_ranks(
    name: str, row: int, tensor: str, ranks: tuple[int, ...]
) -> None:
    layout = LAYOUTS["two DP groups, experts in halves"]
    full = dict(weights(with_mtp=True))
    engine = told(full, layout)
    full[name] = full[name].clone()
    full[name][row] += 1
    assert sent(full, layout).compare(engine).differing == [f"{tensor} on rank {rank}" for rank in ranks]


def test_each_copy_of_an_expert_is_compared() -> None:
    layout = LAYOUTS["redundant experts"]
    full = dict(weights(with_mtp=False))
    engine = told(dict(weights(with_mtp=True)), layout)
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    full[name] = full[name] + 1
    tensor = "model.layers.2.mlp.experts.w2_weight"
    assert sent(full, layout).compare(engine).differing == [f"{tensor} on rank {rank}" for rank in (0, 1)]


def test_a_rank_that_is_not_told_differs() -> None:
    layout = LAYOUTS["tensor"]
    full = dict(weights(with_mtp=False))
    engine = told(dict(weights(with_mtp=True)), layout)
    del engine[2]
    differing = sent(full, layout).compare(engine).differing
    assert differing
    assert {name.rpartition(" ")[2] for name in differing} == {"2"}


def test_a_vocabulary_is_padded_before_it_is_divided() -> None:
    head = torch.ones(100, 2)
    pieces = list(slices("lm_head.weight", head, EngineLayout(tp=4), 8))
    assert [piece.ranks for piece in pieces] == [(0,), (1,), (2,), (3,)]
    assert [(len(piece.content), int(piece.content.sum()) // 2) for piece in pieces] == [(32, 32)] * 3 + [(32, 4)]
    assert [len(piece.content) for piece in slices("lm_head.weight", head, EngineLayout(tp=3), 8)] == [64] * 3


def test_no_more_is_kept_than_an_unfinished_tensor() -> None:
    """A rank's experts are let go of when they are all there, before the other ranks'."""
    layout = EngineLayout(tp=4, ep=4)
    passed: list[weakref.ref[NDArray[np.float32]]] = []
    checksums = ExpectedChecksums(ARCHITECTURE.num_hidden_layers, ARCHITECTURE.n_routed_experts, layout)
    kept = []
    for name, tensor in weights(with_mtp=True):
        memory = tensor.numpy().copy()
        passed.append(weakref.ref(memory))
        checksums.add(name, torch.from_numpy(memory))
        del memory
        kept.append(sum(memory() is not None for memory in passed))
    assert kept[-1] == 0
    assert max(kept) < 2 * ARCHITECTURE.n_routed_experts // layout.ep


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name.startswith("glm")])
def test_a_ranks_slices_are_the_bytes_that_the_plan_counts(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole model, by shapes alone; a draft worker has an embedding and an output head besides, for itself."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    (tmp_path / "config.json").write_text(json.dumps(GLM_4_7_FLASH))
    resolved = resolve(["--recipe", recipe, "--hf-checkpoint", str(tmp_path)])
    layout, architecture = EngineLayout.of(resolved.config), resolved.architecture
    engine = EngineEstimate(architecture, resolved.config, longest_sample=1)
    held = Counter[int]()
    for entry in placements(architecture, engine.is_speculative).values():
        for name in entry.hf_names:
            shape = torch.empty(entry.hf_shape, device="meta")
            twice = engine.is_speculative and name in ("model.embed_tokens.weight", "lm_head.weight")
            for piece in slices(name, shape, layout, architecture.n_routed_experts):
                held.update(dict.fromkeys(piece.ranks, 2 * (1 + twice) * piece.content.numel()))
    assert set(held) == set(range(layout.tp))
    assert set(held.values()) == {engine.weights}
