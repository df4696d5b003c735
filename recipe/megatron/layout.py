"""One rank's place in the layout: process groups by megatron's parallel state, and which ranks speak for others."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from recipe.config import Architecture, Config
from recipe.megatron.device import communication_backend
from recipe.megatron.model import virtual_pipeline_size
from recipe.weights.table import ShardCoordinates

RANDOM_STATE_SEED = 1
"""Seeds megatron's random-state tracker, which recomputation asks for although nothing here draws from it: there is no
dropout, and weights come from checkpoints."""


@dataclass(frozen=True)
class Rendezvous:
    """One rank's way to the others: they meet in a store that all of them reach."""

    rank: int
    local_rank: int
    world_size: int
    store: dist.Store


def local_rank(gpu: int | None) -> int:
    """torch's number of a GPU, which counts those that this process sees; 0 without one."""
    if gpu is None or torch.cuda.device_count() <= 1:
        return 0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",").index(str(gpu)) if seen else gpu


def join(rendezvous: Rendezvous, config: Config, architecture: Architecture) -> None:
    """Joins torch.distributed and builds megatron's process groups."""
    torch.cuda.set_device(rendezvous.local_rank)
    dist.init_process_group(
        communication_backend(),
        store=rendezvous.store,
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timedelta(minutes=config.cluster.distributed_timeout_minutes),
    )
    initialize_model_parallel(config, architecture)


def initialize_model_parallel(config: Config, architecture: Architecture) -> None:
    """megatron's process groups of this run's layout, over a process group that exists already."""
    perf = config.perf
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=perf.tensor_model_parallel_size,
        pipeline_model_parallel_size=perf.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config, architecture),
        context_parallel_size=perf.context_parallel_size,
        expert_model_parallel_size=perf.expert_model_parallel_size,
        expert_tensor_parallel_size=perf.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.cluster.distributed_timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(RANDOM_STATE_SEED)


def leave() -> None:
    """Tears the process groups down."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def shard_coordinates() -> ShardCoordinates:
    """Which shard of every tensor this rank holds."""
    return ShardCoordinates(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
    )
