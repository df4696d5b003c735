"""How long a training step takes on this machine: the run's trainer, with its flags, on a slice of the model.

The slice has the model's widths and vocabulary, its dense layers and a few of those with experts, and random weights.
It is trained as the run does it on as many of its ranks as the machine has GPUs for; there are no stages of a pipeline.
What the slice lacks, the plan has for both: it is asked for the same slice, and the run is as much slower or faster
than planned as the slice was. So is the MTP layer, which the slice does without. Of an optimizer's step, weights that
are gathered afterwards are no part: the plan has the links' seconds for them, which grow in another way than its own.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch.distributed import Store

from recipe.cluster.trainer_group import threads_per_rank
from recipe.config import Architecture, Config, Resolved
from recipe.config.groups_training import MtpConfig
from recipe.messages import TrainSample
from recipe.plan.flops import sequence_cost
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.measured_work import MeasuredWork, WorkKind
from recipe.plan.memory import GpuModel, HostModel, Phase
from recipe.plan.ranges import Pace
from recipe.plan.speed import SpeedModel
from recipe.plan.time_plan import Work
from recipe.smoke.random_model import Load, fill_randomly
from recipe.smoke.together import together
from recipe.system.errors import UserError

if TYPE_CHECKING:
    from recipe.megatron.rank import TrainerRank

MOE_LAYERS = 5
"""As of the slice that the plan's shares of the data sheet were measured on, where so many fit."""
PACKS = 4
"""Of a step, on each rank."""
WARM_UP, STEPS = 2, 3
"""Steps that compile kernels and get memory, and those that count."""


class ComputesWrongly(UserError):
    """This machine does: what was measured of it, and what would be trained on it, is worth nothing."""


def measure_training(resolved: Resolved, machine: Machine, lengths: Lengths) -> tuple[MeasuredWork, MeasuredWork]:
    """Forward and backward, and the optimizer, of a slice on all GPUs of `machine`; without GPUs here, on as many
    processes. Raises UserError if the run's packs do not fit beside the least of slices, or if a rank fails;
    ComputesWrongly if gradients are not finite."""
    part = slice_that_fits(resolved, machine)
    load = load_of(part, machine, lengths)
    settings = part.config.perf
    print(
        f"training {part.architecture.num_hidden_layers} layers on {machine.gpus} GPUs, "
        f"EP {settings.expert_model_parallel_size}, {PACKS} packs of {load.tokens:,} tokens each",
        flush=True,
    )
    found = together("a training step", machine.gpus, train_slice, part.config, part.architecture, load)
    if any(time is None for times in found for time in times):
        raise ComputesWrongly("the gradients of random weights are not finite: this machine computes wrongly")
    seconds = [max(times) for times in zip(*found, strict=True)]  # the others wait for the slowest
    passes, optimizer = (
        MeasuredWork(WorkKind.of(work, resolved.architecture, resolved.config), took, *planned)
        for work, took, planned in zip(
            (Work.TRAIN, Work.OPTIMIZER), seconds, planned_seconds(part, machine, load, lengths), strict=True
        )
    )
    return passes, optimizer


def slice_that_fits(resolved: Resolved, machine: Machine) -> Resolved:
    """The largest of at most MOE_LAYERS layers with experts. Raises UserError if there is none."""
    most = min(MOE_LAYERS, sum(resolved.architecture.moe_layer_freq))
    for moe_layers in range(most, 0, -1):
        part = slice_of(resolved, machine.gpus, moe_layers)
        gpu, host = GpuModel.of(part, machine, on_gpu=True), HostModel.of(part, machine, on_gpu=True)
        [shard] = gpu.shards
        phases = gpu.phase(Phase.TRAINING, shard, None), host.phase(Phase.TRAINING, 0)
        if min(phase.margin for phase in phases) >= 0:
            return part
    raise UserError(
        f"a training step cannot be measured: packs of {resolved.config.perf.max_tokens_per_gpu} tokens do not fit on "
        "these GPUs beside a single layer; lower --max-tokens-per-gpu"
    )


def slice_of(resolved: Resolved, gpus: int, moe_layers: int) -> Resolved:
    """The run with the model's dense layers and so many with experts, on so many GPUs of one machine, each of its
    parallel sizes as large as it can be there."""
    config, architecture = resolved.config, resolved.architecture
    layers = architecture.first_k_dense_replace + moe_layers
    perf = config.perf
    tensor = math.gcd(perf.tensor_model_parallel_size, gpus)
    expert_tensor = math.gcd(perf.expert_tensor_parallel_size, gpus)
    here = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": perf.sequence_parallel and tensor > 1,
        "context_parallel_size": math.gcd(perf.context_parallel_size, gpus // tensor),
        "expert_tensor_parallel_size": expert_tensor,
        "expert_model_parallel_size": math.gcd(perf.expert_model_parallel_size, gpus // expert_tensor),
        "pipeline_model_parallel_size": 1,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "recompute_num_layers": perf.recompute_num_layers and min(perf.recompute_num_layers, layers),
    }
    plain = {  # without what samples would have to bring
        "use_rollout_routing_replay": False,
        "use_routing_replay": False,
        "use_kl_loss": False,
        "custom_tis_function_path": None,
    }
    changed = {
        "cluster": config.cluster.model_copy(update={"actor_num_nodes": 1, "actor_num_gpus_per_node": gpus}),
        "perf": perf.model_copy(update=here),
        "grpo": config.grpo.model_copy(update=plain),
        "checkpoint": config.checkpoint.model_copy(update={"async_save": False}),
        "mtp": MtpConfig(),
    }
    few = architecture.model_copy(update={"num_hidden_layers": layers})
    return replace(resolved, config=config.model_copy(update=changed), architecture=few)


def load_of(part: Resolved, machine: Machine, lengths: Lengths) -> Load:
    """Full packs, of sequences about as long as the run's are on average."""
    model = _speed(part, machine, lengths, Pace.BEST)
    perf = part.config.perf
    tokens = (perf.max_tokens_per_gpu or model.memory.pack.tokens) * perf.context_parallel_size
    return Load(tokens, max(1, tokens // model.mean_length), PACKS, part.architecture.vocab_size)


def planned_seconds(
    part: Resolved, machine: Machine, load: Load, lengths: Lengths
) -> tuple[tuple[float, float], tuple[float, float]]:
    """At best and at worst, of forward and backward over the load of all ranks, and of the optimizer."""
    sequences = part.config.data_parallel_size * load.packs * load.sequences
    flops = sequences * sequence_cost(part.architecture)(float(load.length))
    best, worst = (_speed(part, machine, lengths, pace) for pace in Pace)
    tokens, layers = sequences * load.length, part.architecture.num_hidden_layers
    passes = best.passes(flops, tokens, layers), worst.passes(flops, tokens, layers)
    return passes, (best.optimizer(), worst.optimizer())


def _speed(part: Resolved, machine: Machine, lengths: Lengths, pace: Pace) -> SpeedModel:
    return SpeedModel(GpuModel.of(part, machine, on_gpu=True), lengths, lengths, pace)


def train_slice(
    number: int, store: Store, config: Config, architecture: Architecture, load: Load
) -> tuple[float, float] | tuple[None, None]:
    """One rank's seconds of forward and backward and of the optimizer alone, each the median of some steps; None if
    gradients are not finite."""
    torch.set_num_threads(threads_per_rank(config))
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

    rank = TrainerRank(config, architecture, Rendezvous(number, number, config.world_size, store))
    fill_randomly(rank)
    packs = rank.own_shard([load.of_rank(shard) for shard in range(config.data_parallel_size)])
    taken = [seconds_of_step(rank, packs) for _ in range(WARM_UP + STEPS)]
    rank.close()
    steps = [step for step in taken if step is not None]
    if len(steps) < len(taken):
        return None, None
    passes, optimizer = (statistics.median(times) for times in zip(*steps[WARM_UP:], strict=True))
    return passes, optimizer


def seconds_of_step(rank: "TrainerRank", packs: Sequence[list[TrainSample]]) -> tuple[float, float] | None:
    """Of forward and backward, and of the optimizer without gathering the new weights from the ranks. None if
    gradients are not finite, so that there is no step."""
    gathering: list[float] = []
    began = _now()
    with ExitStack() as stack:
        for replica in rank.replicas:
            timed = _timed(replica.start_param_sync, gathering)
            stack.enter_context(mock.patch.object(replica, "start_param_sync", timed))
        report = rank.train_step(packs)
    if report.skipped:
        return None
    passes = report.of_rank["seconds_forward_backward"]
    return passes, _now() - began - passes - sum(gathering)


def _timed(work: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """`work`, which then also takes down how long it took."""

    def carry_out() -> None:
        began = _now()
        work()
        seconds.append(_now() - began)

    return carry_out


def _now() -> float:
    """Seconds of some clock, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
