"""A rank's parameters by the table's names: filled from Hugging Face tensors, and gathered back into them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from recipe.config import Architecture
from recipe.megatron.layout import shard_coordinates
from recipe.megatron.model import PolicyModel
from recipe.system.heartbeat import heartbeat
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.table import Placement, ShardCoordinates, placements


def named_weights(chunks: list[PolicyModel]) -> dict[str, Tensor]:
    """This rank's parameters and router biases, by megatron's name with the layer's number in the whole model."""
    weights: dict[str, Tensor] = {}
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        biases = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("expert_bias"))
        for name, tensor in [*chunk.named_parameters(), *biases]:
            if name.startswith("decoder.layers."):
                local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{numbers[int(local)]}.{rest}"
            weights[name] = tensor
    return weights


@torch.no_grad()
def load_hugging_face(chunks: list[PolicyModel], architecture: Architecture, checkpoint: HuggingFaceCheckpoint) -> None:
    """Fills this rank's weights from a checkpoint that was inspected, reading only its own pieces."""
    at = shard_coordinates()
    table = placements(architecture, with_mtp=chunks[-1].config.mtp_num_layers is not None)
    for name, weight in named_weights(chunks).items():
        heartbeat.beat()
        placement = table[name]
        local = weight.view(placement.local_shape(at))
        for part in placement.parts(at):
            local[part.index].copy_(checkpoint.read(part.hf_name, part.slices))


@dataclass(frozen=True)
class _Shards:
    """A parameter's pieces from all ranks that share it."""

    placement: Placement
    pieces: list[tuple[ShardCoordinates, Tensor]]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Its Hugging Face tensors, assembled."""
        tensors: dict[str, Tensor] = {}
        for at, piece in self.pieces:
            local = piece.view(self.placement.local_shape(at))
            for part in self.placement.parts(at):
                if part.slices == tuple(slice(0, length) for length in self.placement.hf_shape):
                    tensors[part.hf_name] = local[part.index]
                    continue
                if part.hf_name not in tensors:
                    tensors[part.hf_name] = piece.new_empty(self.placement.hf_shape)
                tensors[part.hf_name][part.slices] = local[part.index]
        yield from ((name, tensors[name]) for name in self.placement.hf_names)


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered


def _stage_of_each_weight(mine: dict[str, Tensor]) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    """For every parameter of the whole model: the pipeline stage that holds it, its local shape and its type."""
    group = parallel_state.get_pipeline_model_parallel_group()
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}
    stages: list[dict] = [{} for _ in range(group.size())]
    dist.all_gather_object(stages, described, group=group)
    # The last stage's copy of the embedding, which MTP brings, gives way to the first's.
    return {name: (stage, *entry) for stage in reversed(range(group.size())) for name, entry in stages[stage].items()}


@torch.no_grad()
def gathered_weights(chunks: list[PolicyModel], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the whole model, one megatron parameter at a time, on the training device.

    A collective over the model-parallel ranks: each must exhaust it; each gets every tensor. No more than one whole
    parameter (the experts of one layer) is held besides the model.
    """
    mine = named_weights(chunks)
    stage_of = _stage_of_each_weight(mine)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    own_stage = parallel_state.get_pipeline_model_parallel_rank()
    device = next(iter(mine.values())).device
    for name, placement in placements(architecture, with_mtp=chunks[-1].config.mtp_num_layers is not None).items():
        heartbeat.beat()
        stage, shape, dtype = stage_of[name]
        weight = mine[name].detach() if stage == own_stage else torch.empty(shape, dtype=dtype, device=device)
        if pipeline.size() > 1:
            weight = weight.contiguous()
            dist.broadcast(weight, src=dist.get_global_rank(pipeline, stage), group=pipeline)
        yield from _Shards(placement, _pieces(placement, weight)).whole()


def _pieces(placement: Placement, weight: Tensor) -> list[tuple[ShardCoordinates, Tensor]]:
    at = shard_coordinates()
    if placement.is_expert:
        by_width = _gather(weight, parallel_state.get_expert_tensor_parallel_group())
        stacked = torch.stack(by_width)
        by_expert = _gather(stacked, parallel_state.get_expert_model_parallel_group())
        return [
            (
                ShardCoordinates(
                    expert_tensor_rank=width,
                    expert_tensor_size=at.expert_tensor_size,
                    expert_rank=expert,
                    expert_size=at.expert_size,
                ),
                piece,
            )
            for expert, pieces in enumerate(by_expert)
            for width, piece in enumerate(pieces)
        ]
    if placement.tensor_axis is None:
        return [(ShardCoordinates(), weight)]
    shards = _gather(weight, parallel_state.get_tensor_model_parallel_group())
    return [
        (ShardCoordinates(tensor_rank=rank, tensor_size=at.tensor_size), shard) for rank, shard in enumerate(shards)
    ]
