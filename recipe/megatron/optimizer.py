"""megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule, built from the configuration."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MLATransformerConfig
from torch import Tensor

from recipe.config import Config
from recipe.megatron import adam
from recipe.megatron.clipping import IS_MTP
from recipe.megatron.model import PolicyModel
from recipe.system.memory import require_host_memory


def wrap_data_parallel(
    transformer: MLATransformerConfig, chunks: list[PolicyModel], config: Config
) -> list[DistributedDataParallel]:
    """Each pipeline chunk with its gradient buffers, sharded for the distributed optimizer."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.misc.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    replicas = [
        DistributedDataParallel(transformer, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for replica in replicas:
        # A rank alone has nothing to exchange; NCCL would copy its buffers onto themselves.
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            exchanged = [one for one in getattr(replica, name) if one.intra_distributed_optimizer_instance_size > 1]
            setattr(replica, name, exchanged)
    return replicas


@dataclass(frozen=True)
class Optimization:
    """The optimizer over all chunks and its schedule."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def step_count(self) -> int:
        """Optimizer steps taken."""
        counts = {group["step"] for inner in self._inner() for group in inner.param_groups}
        assert len(counts) == 1, f"optimizer groups disagree on their step: {counts}"
        return counts.pop()

    def set_step_count(self, count: int) -> None:
        """Restores the steps taken, in the optimizer and in the schedule."""
        for inner in self._inner():
            for group in inner.param_groups:
                group["step"] = count
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=count)

    def allocate(self, offload_fraction: float, ranks: int) -> None:
        """Allocates all state now, this share of it in host memory, and leaves it to `begin` or a checkpoint to fill
        it. Raises UserError if the state of the `ranks` ranks of this machine that belongs in host memory does not fit
        there."""
        owners = [inner for inner in self._inner() if isinstance(inner, adam.MasterAdam)]
        for inner in owners:
            inner.offload(offload_fraction)
        needs: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(needs, sum(inner.needed_host_bytes for inner in owners))
        first = dist.get_rank() // ranks * ranks
        require_host_memory(
            sum(needs[first : first + ranks]),
            "the optimizer state of --optimizer-cpu-offload",
            "use more machines, or a lower --optimizer-offload-fraction",
        )
        dist.barrier()  # all have looked before one allocates
        for part in self._inner():
            part.allocate()

    @property
    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Moments and, where the optimizer owns them, master weights of this rank."""
        states = (state for inner in self._inner() for state in inner.state.values())
        return (tensor for state in states for tensor in state.values())

    @property
    def masters(self) -> Iterator[torch.Tensor]:
        """The fp32 weights of this rank, which the optimizer steps."""
        for inner in self._inner():
            for parameter, state in inner.state.items():
                yield state.get("master_param", parameter)

    def begin(self) -> None:
        """The state before the first step, with the model's weights as they were loaded."""
        self.optimizer.reload_model_params()
        for inner in self._inner():
            inner.begin()

    @property
    def learning_rate(self) -> float:
        """The next step's learning rate."""
        return max(group["lr"] for inner in self._inner() for group in inner.param_groups)

    @property
    def parts(self) -> list[DistributedOptimizer]:
        """Those of the parameters outside the experts and in them, as far as this rank has any."""
        return [part for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer]

    def _inner(self) -> list[adam.Adam]:
        return [part.optimizer for part in self.parts]


def build_optimization(chunks: list[DistributedDataParallel], config: Config) -> Optimization:
    """AdamW, with `--optimizer-cpu-offload` in host memory. All its state is allocated here, and filled once, when the
    weights are there."""
    settings = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.model.bf16,
        params_dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    owns_masters = config.model.bf16 or settings.optimizer_cpu_offload
    if owns_masters:
        # Set after construction: the constructor insists on Transformer Engine for optimizers that own their masters.
        optimizer_config.use_precision_aware_optimizer = True
        optimizer_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        optimizer_config.store_param_remainders = False
    adam.install(adam.MasterAdam if owns_masters else adam.Adam)
    overrides = get_standard_config_overrides(optimizer_config) | {ParamKey(name="module.mtp.*"): {IS_MTP: True}}
    optimizer = get_megatron_optimizer(optimizer_config, chunks, overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or max(config.total_steps, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    optimization = Optimization(optimizer, scheduler)
    fraction = settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0
    optimization.allocate(fraction, config.cluster.actor_num_gpus_per_node)
    return optimization


def host_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of those tensors that lie in host memory."""
    return sum(tensor.nbytes for tensor in tensors if tensor.device == torch.device("cpu"))
