"""Seconds of a step by phase, and what it costs: a stated model, right within a factor of two.

Forward and backward: FLOPs of the model at the share of the data sheet that was measured on one H200. Optimizer, cache
and weights: bytes over bandwidth. Exchange between GPUs: bytes over links. Constants: `recipe.plan.constants`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from recipe.config import Resolved
from recipe.plan import constants
from recipe.plan.disk import plan_disk
from recipe.plan.engine import EngineEstimate
from recipe.plan.flops import active_parameters, sequence_cost
from recipe.plan.hardware import Machine
from recipe.plan.memory import MemoryModel, longest_sample
from recipe.plan.shards import Part

BF16, FP32 = 2, 4


class Work(StrEnum):
    """Parts of a step's time."""

    ROLLOUT = "rollout"
    LOG_PROBS = "log-probs"
    TRAIN = "train"
    OPTIMIZER = "optimizer"
    UPDATE_WEIGHTS = "weight update"
    SAVE = "save"


@dataclass(frozen=True)
class TimePlan:
    """A step (one rollout and what is learned from it) and the run."""

    seconds: Mapping[Work, float]
    """Seconds of a step by kind of work; saves are spread over the steps between them."""
    response_tokens: float
    """Generated a step."""
    tokens: float
    """Trained on a step, prompts included."""
    gpus: int
    rollouts: int
    price: float
    """Dollars a GPU and hour."""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def dollars_a_step(self) -> float:
        return self.step_s / 3600 * self.gpus * self.price

    @property
    def dollars(self) -> float:
        return self.dollars_a_step * self.rollouts

    @property
    def hours(self) -> float:
        return self.step_s * self.rollouts / 3600

    def tokens_per_s(self, work: Work) -> float:
        """Tokens that a phase works on, by its seconds."""
        tokens = self.response_tokens if work is Work.ROLLOUT else self.tokens
        return tokens / self.seconds[work]


@dataclass(frozen=True)
class SpeedModel:
    """The time of one run on GPUs."""

    resolved: Resolved
    machine: Machine
    memory: MemoryModel
    mean_response: float

    @property
    def mean_length(self) -> int:
        """Tokens of a prompt and its response."""
        return min(int(self.mean_response) + constants.MEAN_PROMPT, longest_sample(self.resolved))

    def plan(self) -> TimePlan:
        """All phases that the run has."""
        config = self.resolved.config
        seconds = {Work.TRAIN: self.train(), Work.OPTIMIZER: self.optimizer() * config.steps_per_rollout}
        passes = config.needs_old_log_probs + config.needs_reference
        if passes:
            seconds[Work.LOG_PROBS] = passes * self.train() / 3
        if config.rollout.engine == "sglang" and config.needs_engine and not config.is_sft:
            seconds |= {Work.ROLLOUT: self.rollout(), Work.UPDATE_WEIGHTS: self.update_weights()}
        seconds[Work.SAVE] = self.save()
        samples = config.samples_per_rollout
        return TimePlan(
            seconds={work: seconds[work] for work in Work if work in seconds},
            response_tokens=samples * self.mean_response,
            tokens=samples * self.mean_length,
            gpus=config.world_size + (0 if config.cluster.colocate else config.rollout_gpus * config.needs_engine),
            rollouts=config.rollout.num_rollout,
            price=self.machine.price,
        )

    def train(self) -> float:
        """Forward and backward over a rollout's samples."""
        config, layout = self.resolved.config, self.memory.layout
        share = constants.TRAINING_SHARE
        if config.perf.recompute_granularity == "full":
            share = constants.RECOMPUTING_SHARE
        flops = config.samples_per_rollout * sequence_cost(self.resolved.architecture)(self.mean_length)
        computing = flops / (layout.world * self.machine.gpu.flops * share)
        tokens = config.samples_per_rollout * self.mean_length / layout.world * layout.tp
        packs = max(1.0, tokens / max(1, self.memory.pack.tokens))
        bubble = 1 + (layout.pp - 1) / packs / max(1, len(self.memory.shards[0].chunks))
        waiting = constants.PACKING_LOSS if layout.ep > 1 else 1.0
        return (computing + self.exchange(tokens / layout.tp)) * bubble * waiting + self.reduce_gradients()

    def exchange(self, tokens: float) -> float:
        """Seconds that a rank of so many tokens spends on exchanges in all layers: to experts and back, and between
        tensor-parallel ranks."""
        a, layout = self.resolved.architecture, self.memory.layout
        passes = 3 if self.resolved.config.perf.recompute_granularity == "full" else 2
        layers = a.num_hidden_layers
        row = a.hidden_size * BF16 * passes
        experts = tokens * a.num_experts_per_tok * 2 * row * (layers - a.first_k_dense_replace)
        between = tokens * layout.tp * 4 * row * layers
        seconds = experts * (layout.ep - 1) / layout.ep / self.link(layout.ep * layout.etp)
        return seconds + between * (layout.tp - 1) / layout.tp / self.link(layout.tp)

    def link(self, ranks: int) -> float:
        """Bytes/s between so many neighbouring ranks."""
        inside = ranks <= self.resolved.config.cluster.actor_num_gpus_per_node
        bandwidth = self.machine.gpu.link_bandwidth if inside else self.machine.network_bandwidth
        return bandwidth * constants.LINK_SHARE

    def reduce_gradients(self) -> float:
        """fp32 gradients out, bf16 weights back, of what data-parallel ranks share."""
        layout, fullest = self.memory.layout, max(self.memory.shards, key=lambda shard: shard.buffer_elements)
        dense = fullest.parameters - fullest.elements[Part.EXPERTS]
        seconds = 0.0
        for elements, replicas, span in (
            (dense, layout.dense_replicas, layout.tp * layout.dense_replicas),
            (fullest.elements[Part.EXPERTS], layout.expert_replicas, layout.world // layout.pp),
        ):
            seconds += elements * (FP32 + BF16) * (replicas - 1) / replicas / self.link(span)
        return seconds

    def optimizer(self) -> float:
        """One step: on the GPU by its bandwidth, in host memory by the machine's or by PCIe."""
        memory, gpu = self.memory, self.machine.gpu
        fullest = max(shard.optimizer_elements for shard in memory.shards)
        on_gpu = fullest * constants.GPU_ADAM_BYTES / (gpu.memory_bandwidth * constants.GPU_ADAM_SHARE)
        if not memory.offloaded:
            return on_gpu
        host = fullest * self.machine.gpus * constants.HOST_ADAM_BYTES / self.machine.host_bandwidth
        bus = fullest * (FP32 + BF16) / (gpu.pcie_bandwidth * constants.PCIE_SHARE)
        return (1 - memory.offloaded) * on_gpu + memory.offloaded * max(host, bus)

    def decode_step(self, engine: EngineEstimate, batch: int) -> float:
        """One token of each of `batch` sequences of a GPU: weights (of experts, those that any of the engine's
        sequences asks for) and cache are read once, and every layer has its latency."""
        a, layout = self.resolved.architecture, engine.layout
        sequences = batch * engine.attention_groups
        touched = 1 - (1 - a.num_experts_per_tok / a.n_routed_experts) ** sequences
        width = BF16 * a.moe_intermediate_size * 3 * a.hidden_size
        layers = a.num_hidden_layers - a.first_k_dense_replace
        experts = width * a.n_routed_experts * layers // (layout.tp * layout.pp)
        read = engine.weights() - (1 - touched) * experts
        read += batch * (self.mean_length - self.mean_response / 2) * engine.cache_bytes_per_token
        bandwidth = self.machine.gpu.memory_bandwidth * constants.DECODE_SHARE
        return layout.pp * read / bandwidth + a.num_hidden_layers * constants.DECODE_LAYER_S

    def rollout(self) -> float:
        """Decoding and prefill of all samples, the long ones last. Speculative decoding is not credited."""
        config = self.resolved.config
        engine = EngineEstimate(self.resolved.architecture, config, longest_sample(self.resolved))
        samples = config.samples_per_rollout / (config.num_engines * engine.attention_groups)
        batch = max(1, min(engine.running(), int(samples)))
        decoding = samples * self.mean_response / batch * self.decode_step(engine, batch) * constants.TAIL
        flops = 2 * active_parameters(self.resolved.architecture) * samples * constants.MEAN_PROMPT
        return decoding + flops / (self.machine.gpu.flops * constants.TRAINING_SHARE)

    def update_weights(self) -> float:
        """All weights, gathered and copied, in buckets."""
        config = self.resolved.config
        size = sum(p.elements for p in self.memory.table.values()) * self.memory.weight_bytes
        buckets = -(-size // config.rollout.update_weight_buffer_size)
        spread = 1 if config.cluster.colocate else config.world_size + config.rollout_gpus
        return 2 * size / self.link(max(spread, config.world_size)) + buckets * constants.UPDATE_BUCKET_S

    def save(self) -> float:
        """Writing a checkpoint, spread over the steps between two; nothing where training goes on meanwhile."""
        config = self.resolved.config
        if config.checkpoint.async_save:
            return 0.0
        disk = plan_disk(self.resolved, self.machine)
        return disk.saves * disk.checkpoint / self.machine.disk_bandwidth / config.rollout.num_rollout
