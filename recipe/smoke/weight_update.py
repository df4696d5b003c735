"""How long new weights take to an engine on this machine: all tensors of the model, random ones, the way that the run
sends them, from processes that stand for the trainer's ranks.

They have the whole model at hand, where a trainer has to gather it first; the plan has seconds of its own for that.
"""

import os
import time
from dataclasses import replace
from datetime import timedelta

import torch
from torch.distributed import Store

from recipe.config import Resolved
from recipe.config.engine_placement import weight_sources
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.measured_work import MeasuredWork, WorkKind
from recipe.plan.memory import GpuModel
from recipe.plan.ranges import Pace
from recipe.plan.speed import SpeedModel
from recipe.plan.time_plan import Work
from recipe.smoke.random_model import random_weights
from recipe.smoke.together import together
from recipe.system.errors import UserError
from recipe.system.ports import LOCAL
from recipe.weight_sync.relay import Recipient, Relay
from recipe.weight_sync.sync import WeightSync

UPDATES = 2
"""Of which the quicker one counts: memory and connections of the first are new."""
ENGINE = 0
"""The number of the one engine."""


def measure_update(resolved: Resolved, machine: Machine, lengths: Lengths, url: str) -> tuple[MeasuredWork, ...]:
    """All weights to the run's engine at `url`, on the first GPUs of `machine`, which generates nothing meanwhile and
    has random weights afterwards. Nothing, which is told, if the run's weights go by the disk, or if they are broadcast
    and the engine has all GPUs. Raises UserError if the engine does not take them."""
    config = resolved.config
    engine_gpus, transfer = config.sglang.rollout_num_gpus_per_engine, sync_of(resolved).transfer
    first_gpu = engine_gpus if transfer == "distributed" else 0
    if transfer == "disk" or first_gpu >= machine.gpus:
        print("a weight update is not measured: it goes by the disk, or needs a GPU beside the engine's", flush=True)
        return ()
    count = 1 if transfer == "distributed" else 1 + max(weight_sources(config, ENGINE))
    seconds = max(together("a weight update", count, send_weights, resolved, url, first_gpu))
    cluster = config.cluster.model_copy(update={"actor_num_nodes": 1, "actor_num_gpus_per_node": machine.gpus})
    here = replace(resolved, config=config.model_copy(update={"cluster": cluster}))
    memory = GpuModel.of(here, machine, on_gpu=True)
    planned = (SpeedModel(memory, lengths, lengths, pace).send_weights() for pace in Pace)
    return (MeasuredWork(WorkKind.of(Work.UPDATE_WEIGHTS, resolved.architecture, config), seconds, *planned),)


def sync_of(resolved: Resolved) -> WeightSync:
    """The run's, to an engine that nobody asks meanwhile; what it holds afterwards is not compared."""
    return replace(WeightSync.of(resolved.config, resolved.architecture, LOCAL), checksums=None, in_flight=None)


def send_weights(rank: int, store: Store, resolved: Resolved, url: str, first_gpu: int) -> float:
    """Seconds of the quickest update, of one of the processes that send; the first one's GPU has number `first_gpu`.
    Raises UserError if the engine fails."""
    config, sync, device = resolved.config, sync_of(resolved), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", first_gpu + rank)
        torch.cuda.set_device(device)
    if sync.transfer == "distributed":
        from recipe.cluster.placement import nccl_settings

        os.environ.update(nccl_settings(config))
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    with_mtp = bool(config.mtp.mtp_num_layers)
    weights = list(random_weights(resolved.architecture, with_mtp=with_mtp, dtype=dtype, device=device))
    recipient = Recipient(ENGINE, url, weight_sources(config, ENGINE))
    timeout = timedelta(minutes=config.cluster.distributed_timeout_minutes)
    times = []
    for update in range(UPDATES):
        relay = None if sync.transfer == "distributed" else Relay(store, update, rank, [recipient], timeout)
        engines = {ENGINE: url} if relay is None else relay.engines
        began = time.monotonic()
        result = sync.send(weights, engines, f"random {update}", relay)
        times.append(time.monotonic() - began)
        result.check_taken()
        if result.failed:
            raise UserError(result.failed[ENGINE])
    return min(times)
