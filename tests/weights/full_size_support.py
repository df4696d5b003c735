"""The real GLM-4.7-Flash without its weights: its names and shapes as transformers has them, and the trainer's ranks
built on the meta device, one after the other, in one process with pretended process groups."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from config_support import GLM_4_7_FLASH
from torch import Tensor

from recipe.config import Resolved, resolve
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.table import ShardCoordinates

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""A piece of a tensor: where it begins and ends along each axis."""


def as_stored(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of a checkpoint for a transformers model's own. In memory it fuses a layer's experts into
    `gate_up_proj` [E, 2F, H] and `down_proj` [E, H, F]; on disk each expert has its three matrices."""
    stored: dict[str, Shape] = {}
    for name, shape in shapes.items():
        layer, fused, kind = name.partition(".mlp.experts.")
        if not fused:
            stored[name] = shape
            continue
        experts, rows, columns = shape
        for expert in range(experts):
            if kind == "gate_up_proj":
                stored[f"{layer}{fused}{expert}.gate_proj.weight"] = (rows // 2, columns)
                stored[f"{layer}{fused}{expert}.up_proj.weight"] = (rows // 2, columns)
            else:
                assert kind == "down_proj"
                stored[f"{layer}{fused}{expert}.down_proj.weight"] = (rows, columns)
    return stored


def main_model_shapes() -> dict[str, Shape]:
    """Names and shapes of the main model by transformers, which knows no MTP layer."""
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    with torch.device("meta"):
        model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**GLM_4_7_FLASH))
    return as_stored({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def mtp_shapes(main_model: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the MTP layer: an expert layer like the last one, numbered one on, and four of its own."""
    last, own = "model.layers.46.", "model.layers.47."
    layer = {own + name.removeprefix(last): shape for name, shape in main_model.items() if name.startswith(last)}
    return layer | {
        f"{own}eh_proj.weight": (2048, 4096),
        f"{own}enorm.weight": (2048,),
        f"{own}hnorm.weight": (2048,),
        f"{own}shared_head.norm.weight": (2048,),
    }


class HollowCheckpoint:
    """Stands for a HuggingFaceCheckpoint: names and shapes without a byte behind them. Remembers what is read."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self.reads: list[tuple[str, Box]] = []

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        shape = self._shapes[name]
        slices = slices or tuple(slice(0, length) for length in shape)
        self.reads.append((name, tuple((piece.start, piece.stop) for piece in slices)))
        return torch.empty(shape, device="meta")[slices]


@dataclass(frozen=True)
class RankView:
    """One rank: what megatron's model holds there, and what the trainer reads from a checkpoint to fill it."""

    stage: int
    """Of the pipeline."""
    layers: tuple[int, ...]
    """Decoder layers there, counted from 0 over the whole model."""
    at: ShardCoordinates
    shapes: dict[str, Shape]
    """Shapes of the parameters and router biases, by the trainer's names."""
    dtypes: dict[str, torch.dtype]
    split_axes: dict[str, int]
    """The axis along which megatron's mark says that a parameter is split over tensor-parallel ranks. Where there is no
    mark, gradient norms count the parameter on the first of those ranks only, as a copy."""
    held: int
    """Elements of all parameters and router biases, counted by torch."""
    local_experts: frozenset[tuple[int, ...]]
    """Which of the whole model's experts the rank computes, as megatron's layers have it (all alike: one entry)."""
    vocabulary: tuple[int, int] | None
    """Rows of the embedding that megatron looks up there; None without an embedding."""
    reads: list[tuple[str, Box]]


def resolve_full_size(folder: Path, flags: Sequence[str]) -> Resolved:
    """The configuration of a run of the real model with these flags."""
    (folder / "config.json").write_text(json.dumps(GLM_4_7_FLASH))
    return resolve(["--hf-checkpoint", str(folder), *flags])


def view_ranks(resolved: Resolved, checkpoint: Mapping[str, Shape]) -> list[RankView]:
    """Every rank of the layout in turn. For a process of its own: it prepares torch for the trainer."""
    return [_view_rank(rank, resolved, checkpoint) for rank in range(resolved.config.world_size)]


def _view_rank(rank: int, resolved: Resolved, checkpoint: Mapping[str, Shape]) -> RankView:
    import recipe.megatron  # noqa: F401, I001 (before megatron)
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from recipe.megatron import layout
    from recipe.megatron.model import PolicyModel, transformer_config
    from recipe.megatron.weights import load_hugging_face

    config, architecture, meta = resolved.config, resolved.architecture, torch.device("meta")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.world_size)
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    with mock.patch.object(parallel_state, "initialize_model_parallel", without_gloo):
        layout.initialize_model_parallel(config, architecture)
    try:
        with meta, mock.patch.object(torch.cuda, "current_device", return_value=meta):
            chunk = PolicyModel(transformer_config(config, architecture), config, architecture)
        hollow = HollowCheckpoint(checkpoint)
        load_hugging_face([chunk], architecture, cast(HuggingFaceCheckpoint, hollow))
        return _view(chunk, hollow.reads)
    finally:
        layout.leave()


def _view(chunk: Any, reads: list[tuple[str, Box]]) -> RankView:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from recipe.megatron.layout import shard_coordinates
    from recipe.megatron.weights import named_weights

    weights = named_weights([chunk])
    modules = list(chunk.modules())
    expert_layers = [module for module in modules if isinstance(module, MoELayer)]
    biases = [buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
    embeddings = [module for module in modules if isinstance(module, VocabParallelEmbedding)]
    return RankView(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        layers=tuple(layer.layer_number - 1 for layer in chunk.decoder.layers),
        at=shard_coordinates(),
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        dtypes={name: weight.dtype for name, weight in weights.items()},
        split_axes={
            name: int(weight.partition_dim)  # type: ignore[attr-defined]
            for name, weight in weights.items()
            if getattr(weight, "tensor_model_parallel", False)
        },
        held=sum(tensor.numel() for tensor in [*chunk.parameters(), *biases]),
        local_experts=frozenset(tuple(layer.local_expert_indices) for layer in expert_layers),
        vocabulary=(embeddings[0].vocab_start_index, embeddings[0].vocab_end_index) if embeddings else None,
        reads=reads,
    )
