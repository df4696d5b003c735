"""Optimizer state as a checkpoint has it: whole tensors by parameter, each written by one of the ranks that hold it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from recipe.system.heartbeat import heartbeat

Span = tuple[int, int]
"""Where a rank's piece of a flat parameter begins and ends."""


def sharded_state(
    part: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool, _: dict[str, Any]
) -> dict[int, dict[str, ShardedBase]]:
    """What megatron's `sharded_param_state_fully_reshardable` returns, where every rank would read all state, and one
    of them write it, sent by the others. Here the rank that holds most of a parameter writes its tensors: those
    themselves, if it holds all, or copies for which it has got its neighbours' pieces; and the ranks that hold a part
    of it read them. Collective over the ranks of `part`."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    shard_of = {shard.data: shard for shard in nested_values(sharded)}
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    own = part.data_parallel_group.rank()
    states: dict[int, dict[str, ShardedBase]] = {}
    for index, (parameter, spans) in enumerate(zip(parameters, _spans(part, parameters), strict=True)):
        if own not in spans:
            continue
        owner = max(spans, key=lambda rank: (spans[rank][1] - spans[rank][0], -rank))
        state = part._get_main_param_and_optimizer_states(parameter)
        tensors = pieces = {name: piece.detach() for name, piece in sorted(state.items())}
        if len(spans) > 1:
            tensors = {}
            if is_loading or own == owner:
                tensors = {name: torch.empty(parameter.numel(), dtype=piece.dtype) for name, piece in pieces.items()}
            if not is_loading:
                _collect(part, pieces, spans, owner, tensors)
        if tensors:
            shard = shard_of[parameter]
            states[index] = {name: _state_like(shard, name, tensor, own == owner) for name, tensor in tensors.items()}
    return states


def _spans(part: DistributedOptimizer, parameters: list[Parameter]) -> list[dict[int, Span]]:
    """The pieces of every parameter, by rank."""
    held: dict[int, Span] = {}
    index_of = {parameter: index for index, parameter in enumerate(parameters)}
    for buckets in (ranges for buffer in part.gbuf_ranges for ranges in buffer.values()):
        for bucket in buckets:
            for parameter, ranges in bucket["param_map"].items():
                held[index_of[parameter]] = ranges["param"].start, ranges["param"].end
    ranks = [held]
    if part.data_parallel_group.size() > 1:
        ranks = [{}] * part.data_parallel_group.size()
        dist.all_gather_object(ranks, held, group=part.data_parallel_group_gloo)
    return [
        {rank: spans[index] for rank, spans in enumerate(ranks) if index in spans} for index in range(len(parameters))
    ]


def _collect(
    part: DistributedOptimizer,
    pieces: Mapping[str, Tensor],
    spans: Mapping[int, Span],
    owner: int,
    whole: Mapping[str, Tensor],
) -> None:
    """Puts a parameter's flat state tensors together in the owner's `whole`."""
    group, own = part.data_parallel_group_gloo, part.data_parallel_group.rank()
    for name, piece in pieces.items():
        heartbeat.beat()
        if own != owner:
            dist.send(piece.cpu().contiguous(), group=group, group_dst=owner)
            continue
        for rank, (start, end) in spans.items():
            if rank == own:
                whole[name][start:end] = piece
            else:
                dist.recv(whole[name][start:end], group=group, group_src=rank)


def _state_like(shard: ShardedBase, name: str, tensor: Tensor, is_owner: bool) -> ShardedBase:
    """A state tensor, sharded as its parameter is; the owner's is the one that is written."""
    # The last number of a replica is its rank in the data-parallel group.
    of_replica = shard.replica_id[:-1] if isinstance(shard.replica_id, tuple) else ()
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{shard.key}",
        "data": tensor.view(shard.data.shape),
        "replica_id": (*of_replica, int(not is_owner)),
    }
    if isinstance(shard, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(shard, **changes)
