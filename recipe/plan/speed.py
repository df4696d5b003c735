"""Seconds of a step by phase: a stated model, at the best and at the worst of what is not measured.

Forward and backward: FLOPs of the model at the share of the data sheet that was measured on one H200. Optimizer and
weights: bytes over bandwidth. Exchange between GPUs: bytes over links. Where such work was measured on the machine, its
seconds are multiplied by what it took there over what this model has for it (`recipe.plan.measured_work`). Rollouts are
played through (`recipe.plan.generation`). Constants: `recipe.plan.constants`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recipe.config import Resolved
from recipe.plan import constants
from recipe.plan.disk import plan_disk
from recipe.plan.flops import sequence_cost
from recipe.plan.generation import Generation
from recipe.plan.lengths import Lengths
from recipe.plan.measured_work import WorkKind
from recipe.plan.memory import GpuModel, longest_sample
from recipe.plan.playout import Played
from recipe.plan.ranges import Between, Pace
from recipe.plan.time_plan import TimePlan, Work

BF16, FP32 = 2, 4


def plan_time(memory: GpuModel, lengths: Lengths, eval_lengths: Lengths) -> TimePlan:
    """All phases that the run has, on GPUs."""
    best, worst = (SpeedModel(memory, lengths, eval_lengths, pace) for pace in (Pace.BEST, Pace.WORST))
    config = memory.resolved.config
    fast, slow = best.seconds(), worst.seconds()
    samples = config.samples_per_rollout
    engine_gpus = 0 if config.cluster.colocate else config.rollout_gpus * config.needs_engine
    evaluations = 0
    if best.generates and config.eval.eval_prompt_data:
        rollouts, every = config.rollout.num_rollout, config.eval.eval_interval
        evaluations = (1 if every is None else rollouts // every) + (not config.eval.skip_eval_before_train)
    return TimePlan(
        seconds={work: Between(fast[work], slow[work]) for work in Work if work in fast},
        tail=Between(best.rollout.tail_s, worst.rollout.tail_s) if best.generates else Between.exactly(0.0),
        evaluation=Between(best.evaluation(), worst.evaluation()) if evaluations else Between.exactly(0.0),
        evaluations=evaluations,
        response_tokens=samples * lengths.mean,
        tokens=samples * best.mean_length,
        gpus=config.world_size + engine_gpus,
        rollouts=config.rollout.num_rollout,
        price=memory.machine.price,
        engine_gpus=engine_gpus,
        alone=Between(best.rollout_alone_s, worst.rollout_alone_s) if best.is_async else None,
    )


@dataclass(frozen=True)
class SpeedModel:
    """The time of one run on GPUs at one pace."""

    memory: GpuModel
    lengths: Lengths
    eval_lengths: Lengths
    pace: Pace

    @property
    def resolved(self) -> Resolved:
        return self.memory.resolved

    @property
    def mean_length(self) -> int:
        """Tokens of a prompt and its response."""
        return min(int(self.lengths.mean) + constants.MEAN_PROMPT, longest_sample(self.resolved))

    @property
    def generates(self) -> bool:
        """Whether the run has engines on GPUs whose time is planned."""
        config = self.resolved.config
        return config.rollout.engine == "sglang" and config.needs_engine and not config.is_sft

    @property
    def is_async(self) -> bool:
        """Whether rollouts are generated beside training."""
        return self.generates and self.resolved.config.rollout.staleness > 0

    @cached_property
    def generation(self) -> Generation:
        return Generation(self.resolved, self.memory, self.lengths, self.eval_lengths, self.pace)

    @cached_property
    def rollout(self) -> Played:
        """One, or what a step has of several that are under way beside training."""
        if self.is_async:
            return self.generation.beside_training(sum(self.learning().values()))
        return self.generation.rollout()

    @cached_property
    def rollout_alone_s(self) -> float:
        """Seconds of one that nothing goes on beside."""
        return self.generation.rollout().seconds

    def evaluation(self) -> float:
        """Seconds of one."""
        return self.generation.evaluation().seconds

    def seconds(self) -> dict[Work, float]:
        """Of a step, by kind of work."""
        seconds = self.learning()
        if self.generates:
            seconds |= {Work.ROLLOUT: self.rollout.seconds, Work.UPDATE_WEIGHTS: self.update_weights()}
        return seconds

    def learning(self) -> dict[Work, float]:
        """Seconds of what the trainer does by itself, by kind of work."""
        config = self.resolved.config
        optimizer = self.optimizer() * self.factor(Work.OPTIMIZER) + self.gather_weights()
        seconds = {Work.TRAIN: self.train(), Work.OPTIMIZER: optimizer * config.steps_per_rollout}
        passes = config.needs_old_log_probs + config.needs_reference
        if passes:
            seconds[Work.LOG_PROBS] = passes * self._over_samples(steps=0, trains_mtp=False) / 3
        seconds[Work.SAVE] = self.save()
        return seconds

    def factor(self, work: Work) -> float:
        """What was measured of such work over what this model has for it; 1 where nothing was."""
        kind = WorkKind.of(work, self.resolved.architecture, self.resolved.config)
        found = [one for one in self.memory.machine.work if one.kind == kind]
        return found[-1].factor(self.pace) if found else 1.0

    def train(self) -> float:
        """Forward and backward over a rollout's samples, in the loop."""
        return self._over_samples(self.resolved.config.steps_per_rollout, trains_mtp=self.trains_mtp)

    def _over_samples(self, steps: int, *, trains_mtp: bool) -> float:
        """As `train`, with gradients to so many optimizer steps, and with or without the MTP layer. What the loop and
        unequal packs add is not measured with the rest."""
        samples = self.resolved.config.samples_per_rollout
        longest = longest_sample(self.resolved)
        sequences = np.minimum(self.lengths.quantiles + constants.MEAN_PROMPT, longest)
        cost = sequence_cost(self.resolved.architecture, trains_mtp=trains_mtp)
        flops = samples * float(cost(sequences).mean())
        loss = constants.TRAINING_LOSS.at(self.pace)
        if self.memory.layout.ep > 1:
            loss *= constants.PACKING_LOSS.at(self.pace)
        layers = self.layers(trains_mtp=trains_mtp)
        return self.passes(flops, samples * self.mean_length, layers, loss, steps) * self.factor(Work.TRAIN)

    def passes(self, flops: float, tokens: int, layers: int, loss: float = 1.0, steps: int = 1) -> float:
        """Forward and backward of all ranks over so many tokens, on which so many layers have so many FLOPs, in full
        packs, and gradients to as many optimizer steps: computing and exchanges take `loss` times as long as by
        themselves."""
        layout, again = self.memory.layout, self.recomputed
        time = again / constants.RECOMPUTING_SHARE + (1 - again) / constants.TRAINING_SHARE
        computing = flops * time / (layout.world * self.memory.machine.gpu.flops)
        each = tokens / layout.world * layout.tp
        packs = max(1.0, each / max(1, self.memory.pack.tokens))
        bubble = 1 + (layout.pp - 1) / packs / max(1, len(self.memory.shards[0].chunks))
        return (computing + self.exchange(each / layout.tp, layers)) * bubble * loss + steps * self.reduce_gradients()

    @property
    def recomputed(self) -> float:
        """Share of the layers that go forward once more."""
        perf = self.resolved.config.perf
        if perf.recompute_granularity != "full":
            return 0.0
        longest = max(len(shard.layers) for shard in self.memory.shards)
        return 1.0 if perf.recompute_method == "uniform" else min(1.0, (perf.recompute_num_layers or 1) / longest)

    @property
    def trains_mtp(self) -> bool:
        """Whether there is one layer more to train."""
        return self.resolved.config.mtp.enable_mtp_training

    def layers(self, *, trains_mtp: bool) -> int:
        """Of the model, with the MTP layer if it is trained."""
        return self.resolved.architecture.num_hidden_layers + trains_mtp

    def exchange(self, tokens: float, layers: int) -> float:
        """Seconds that a rank of so many tokens spends on exchanges in so many layers: to experts and back, and between
        tensor-parallel ranks."""
        a, layout = self.resolved.architecture, self.memory.layout
        passes = 2 + self.recomputed
        row = a.hidden_size * BF16 * passes
        experts = tokens * a.num_experts_per_tok * 2 * row * (layers - a.first_k_dense_replace)
        between = tokens * layout.tp * 4 * row * layers
        seconds = experts * (layout.ep - 1) / layout.ep / self.exchanged(layout.ep * layout.etp)
        return seconds + between * (layout.tp - 1) / layout.tp / self.exchanged(layout.tp)

    def link(self, ranks: int) -> float:
        """Bytes/s that the data sheet has between so many neighbouring ranks."""
        inside = ranks <= self.resolved.config.cluster.actor_num_gpus_per_node
        return self.memory.machine.gpu.link_bandwidth if inside else self.memory.machine.network_bandwidth

    def exchanged(self, ranks: int) -> float:
        """Bytes/s of the trainer's collective operations between so many neighbouring ranks."""
        return self.link(ranks) * constants.EXCHANGE_SHARE.at(self.pace)

    def reduce_gradients(self) -> float:
        """fp32 gradients to the ranks that have their optimizer's state."""
        return self._over_replicas(FP32)

    def gather_weights(self) -> float:
        """bf16 weights back from them, at the end of the optimizer's step."""
        return self._over_replicas(BF16)

    def _over_replicas(self, width: int) -> float:
        """Seconds in which so many bytes of each trained parameter pass between the ranks that share it."""
        layout, fullest = self.memory.layout, max(self.memory.shards, key=lambda shard: shard.buffer_elements)
        dense, experts = (sum(sizes) for sizes in zip(*(chunk.buffers for chunk in fullest.chunks), strict=True))
        seconds = 0.0
        for elements, replicas, span in (
            (dense, layout.dense_replicas, layout.tp * layout.dense_replicas),
            (experts, layout.expert_replicas, layout.world // layout.pp),
        ):
            seconds += elements * width * (replicas - 1) / replicas / self.exchanged(span)
        return seconds

    def optimizer(self) -> float:
        """One step, weights not yet gathered: on the GPU by its bandwidth, in host memory by the machine's or by
        PCIe."""
        memory, gpu = self.memory, self.memory.machine.gpu
        fullest = max(shard.optimizer_elements for shard in memory.shards)
        on_gpu = fullest * constants.GPU_ADAM_BYTES / (gpu.memory_bandwidth * constants.GPU_ADAM_SHARE)
        if not memory.offloaded:
            return on_gpu
        ranks = self.resolved.config.cluster.actor_num_gpus_per_node
        host = fullest * ranks * constants.HOST_ADAM_BYTES / memory.machine.host_bandwidth.at(self.pace)
        bus = fullest * (FP32 + BF16) / (gpu.pcie_bandwidth * constants.PCIE_SHARE)
        return (1 - memory.offloaded) * on_gpu + memory.offloaded * max(host, bus)

    def update_weights(self) -> float:
        """All weights: gathered from the ranks, and sent; where sending was measured, with what it takes more there."""
        more = self.factor(Work.UPDATE_WEIGHTS) - 1
        return self.send_weights(times=2) + more * self.send_weights()

    def send_weights(self, times: int = 1) -> float:
        """All weights over the links so many times, and in buckets to engines, which have them copied or, on GPUs of
        their own, broadcast in one group."""
        config = self.resolved.config
        size = sum(p.elements for p in self.memory.table.values()) * self.memory.weight_bytes
        buckets = -(-size // config.rollout.update_weight_buffer_size)
        rate = self.link(config.world_size) * constants.LINK_SHARE
        group = 0.0 if config.cluster.colocate else constants.UPDATE_GROUP_S
        return times * size / rate + buckets * constants.UPDATE_BUCKET_S.at(self.pace) + group

    def save(self) -> float:
        """Writing a checkpoint, spread over the steps between two; nothing where training goes on meanwhile."""
        config = self.resolved.config
        if config.checkpoint.async_save:
            return 0.0
        machine = self.memory.machine
        disk = plan_disk(self.resolved, machine)
        return disk.saves * disk.checkpoint / machine.disk_bandwidth.at(self.pace) / config.rollout.num_rollout
