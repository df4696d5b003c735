"""Memory of the run's GPUs and machines, by phase and part."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Self

from recipe.config import Resolved
from recipe.config.engine_placement import engine_gpus_of
from recipe.plan import constants
from recipe.plan.activations import ActivationModel, Pack, microbatches_in_flight
from recipe.plan.constants import SLOT_ELEMENTS
from recipe.plan.engine import EngineEstimate, EngineMemory
from recipe.plan.hardware import Machine
from recipe.plan.shards import Layout, StageShard, stage_shards, table_of
from recipe.weights.table import Placement

FP32, BF16 = 4, 2


class Phase(StrEnum):
    """What a run does, of which each has its own peak of memory."""

    RESUME = "resume"
    TRAINING = "training"
    UPDATE_WEIGHTS = "weight update"
    ROLLOUT = "rollout"
    SAVE = "save"


class Use(StrEnum):
    """What memory is used for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOG_PROBS = "log-probs and loss"
    REFERENCE = "reference model"
    ENGINE_WEIGHTS = "engine weights"
    KV_CACHE = "KV cache"
    CUDA_GRAPHS = "CUDA graphs"
    ENGINE_ACTIVATIONS = "engine activations"
    BUFFERS = "weights on their way"
    CHECKPOINT = "checkpoint"
    ROUTING = "routing to replay"
    COMMUNICATION = "communication"
    PROCESSES = "processes"


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes by use at a phase's worst moment, and what there is."""

    phase: Phase
    uses: Mapping[Use, int]
    capacity: int

    @property
    def total(self) -> int:
        return sum(self.uses.values())

    @property
    def margin(self) -> int:
        """Negative: it does not fit."""
        return self.capacity - self.total


def longest_sample(resolved: Resolved) -> int:
    """Tokens of the longest prompt and response together."""
    config = resolved.config
    prompt = config.data.rollout_max_prompt_len or min(constants.LONGEST_PROMPT, resolved.max_prompt_len)
    return min(prompt + config.rollout.rollout_max_response_len, resolved.max_context_len)


def object_store_bytes(resolved: Resolved) -> int:
    """Size of Ray's object store on every machine: the samples of a rollout, all as long as can be, with their routing
    if it is replayed, and a quarter more. What is beyond the largest store goes by files. Weights never pass through
    Ray."""
    config, a = resolved.config, resolved.architecture
    each = constants.TRAIN_SAMPLE_BYTES
    if config.grpo.replays_routing:
        each += sum(a.moe_layer_freq) * a.num_experts_per_tok
    samples = config.samples_per_rollout * longest_sample(resolved) * each
    return min(max(constants.LEAST_OBJECT_STORE, samples + samples // 4), constants.LARGEST_OBJECT_STORE)


@dataclass(frozen=True)
class MemoryModel:
    """The memory of one run. Without GPUs everything lies in host memory."""

    resolved: Resolved
    machine: Machine
    on_gpu: bool
    pack: Pack

    @classmethod
    def of(cls, resolved: Resolved, machine: Machine, on_gpu: bool) -> Self:
        return cls(resolved, machine, on_gpu, Pack.largest(resolved.config, longest_sample(resolved)))

    @cached_property
    def shards(self) -> tuple[StageShard, ...]:
        """What the ranks of each pipeline stage hold."""
        return stage_shards(self.resolved.config, self.resolved.architecture)

    @property
    def table(self) -> Mapping[str, Placement]:
        """The trainer's parameters."""
        return table_of(self.resolved.architecture, bool(self.resolved.config.mtp.mtp_num_layers))

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.resolved.config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the trainer."""
        return BF16 if self.resolved.config.model.bf16 else FP32

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state a parameter: two moments, and master weights where there are any."""
        config = self.resolved.config
        return 12 if config.model.bf16 or config.optimizer.optimizer_cpu_offload else 8

    @property
    def offloaded(self) -> float:
        """Share of the optimizer that lies in host memory."""
        settings = self.resolved.config.optimizer
        return settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0

    def held(self, shard: StageShard) -> dict[Use, int]:
        """What a rank's tensors take on its device throughout the run."""
        state = int(shard.optimizer_elements * self.state_bytes * (1 - self.offloaded))
        return {
            Use.WEIGHTS: shard.weight_elements * self.weight_bytes + shard.bias_elements * FP32,
            Use.GRADIENTS: shard.buffer_elements * FP32,
            Use.OPTIMIZER: state if self.on_gpu else shard.optimizer_elements * self.state_bytes,
        }

    def computing(self, shard: StageShard) -> dict[Use, int]:
        """What a rank needs besides while it goes forward and backward."""
        config, a = self.resolved.config, self.resolved.architecture
        model = ActivationModel(a, config, self.pack, self.on_gpu)
        samples = config.global_batch_size // config.data_parallel_size
        microbatches = max(1, samples * longest_sample(self.resolved) // max(1, self.pack.tokens * self.layout.cp))
        flying = microbatches_in_flight(shard.stage, self.layout.pp, len(shard.chunks), microbatches)
        found = model.of_stage(shard, flying)
        tables = len(shard.layers) * 2 ** math.ceil(math.log2(max(2, self.pack.longest))) * a.qk_rope_head_dim * FP32
        layer = found.layer if found.layer > found.log_probs else 0
        uses = {
            Use.ACTIVATIONS: found.kept + layer + tables,
            Use.LOG_PROBS: found.log_probs if not layer else 0,
        }
        if self.on_gpu:
            uses[Use.ACTIVATIONS] += constants.CUBLAS_WORKSPACE
        return uses

    def processes(self) -> dict[Use, int]:
        """What the trainer's process takes on its GPU outside its tensors."""
        layout = self.layout
        sizes = layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.dense_replicas, layout.expert_replicas
        groups = sum(size > 1 for size in (*sizes, layout.world))
        return {Use.COMMUNICATION: groups * constants.NCCL_COMMUNICATOR, Use.PROCESSES: constants.CUDA_CONTEXT}


@dataclass(frozen=True)
class GpuPlan:
    """The fullest GPU in each phase, and what its engine's cache holds."""

    phases: tuple[PhaseMemory, ...]
    engine: EngineMemory | None


class GpuModel(MemoryModel):
    """The GPUs. Where engine and trainer share them, `mem_fraction_static` is a share of what the trainer's tensors
    leave, whichever of the two starts first, and the engine releases its memory while the trainer computes."""

    @property
    def has_engine(self) -> bool:
        config = self.resolved.config
        return config.needs_engine and config.rollout.engine == "sglang"

    @property
    def shares(self) -> bool:
        return self.has_engine and self.resolved.config.cluster.colocate

    def plan(self) -> GpuPlan:
        """All phases, each on the rank whose GPU is fullest in it."""
        engine = self.engine_memory
        phases = []
        for phase in (Phase.TRAINING, Phase.UPDATE_WEIGHTS, Phase.ROLLOUT, Phase.SAVE):
            found = [self.phase(phase, shard, engine) for shard in self.shards]
            if any(one.uses for one in found):
                phases.append(min(found, key=lambda one: one.margin))
        return GpuPlan(tuple(phases), engine)

    def resident(self, shard: StageShard) -> int:
        """Bytes that a rank never gives back."""
        return sum(self.held(shard).values()) + sum(self.processes().values())

    @cached_property
    def engine_memory(self) -> EngineMemory | None:
        """On the GPU where the trainer leaves least."""
        if not self.has_engine:
            return None
        model = EngineEstimate(self.resolved.architecture, self.resolved.config, longest_sample(self.resolved))
        gpu = self.machine.gpu
        if self.shares:
            gpu = replace(gpu, memory=gpu.memory - max(map(self.resident, self.shards)))
        return model.memory(gpu)

    def engine_process(self) -> dict[Use, int]:
        """An engine's process beside its tensors."""
        groups = 2 if self.several else 0
        return {Use.COMMUNICATION: groups * constants.NCCL_COMMUNICATOR, Use.PROCESSES: constants.CUDA_CONTEXT}

    @property
    def several(self) -> bool:
        """Whether an engine has several GPUs."""
        return self.resolved.config.sglang.rollout_num_gpus_per_engine > 1

    def update_group(self) -> dict[Use, int]:
        """What a member of the group has in which weights are broadcast to engines on GPUs of their own."""
        return {Use.COMMUNICATION: constants.NCCL_COMMUNICATOR}

    def released(self) -> dict[Use, int]:
        """What an engine's process keeps although it has released its memory."""
        kept = constants.RELEASED_ENGINE_OF_SEVERAL if self.several else constants.RELEASED_ENGINE
        drafts = "speculative_algorithm" in self.resolved.config.sglang.args
        return {Use.PROCESSES: kept + drafts * constants.RELEASED_DRAFTS}

    def phase(self, phase: Phase, shard: StageShard, engine: EngineMemory | None) -> PhaseMemory:
        """One rank's GPU in one phase; on GPUs of its own, an engine's GPU in rollouts, which takes its weights beside
        its cache, in a group that is formed for them."""
        parts: list[Mapping[Use, int]] = []
        if self.shares or phase is not Phase.ROLLOUT:
            parts += [self.held(shard), self.processes()]
        if phase is Phase.TRAINING:
            computing = self.computing(shard)
            spare = int(constants.FRAGMENTATION * sum(computing.values()))
            parts += [computing, {Use.ACTIVATIONS: spare}]
            if self.shares:
                parts += [self.engine_process(), self.released()]
        if phase is Phase.UPDATE_WEIGHTS and self.has_engine:
            parts += [{Use.BUFFERS: self.gathered()}]
            parts += [self.released() if self.shares else self.update_group()]
        if engine is not None and (self.shares or phase is Phase.ROLLOUT) and phase is not Phase.TRAINING:
            parts += [self.engine_process(), {Use.ENGINE_WEIGHTS: engine.weights}]
            if phase is not Phase.UPDATE_WEIGHTS:
                parts += [{Use.KV_CACHE: engine.kv_cache, Use.CUDA_GRAPHS: engine.cuda_graphs}]
            if phase is Phase.ROLLOUT:
                parts += [{Use.ENGINE_ACTIVATIONS: engine.activations}]
                if not self.shares:
                    bucket = self.resolved.config.rollout.update_weight_buffer_size
                    parts += [self.update_group(), {Use.BUFFERS: bucket}]
        return PhaseMemory(phase, _sum(parts), self.machine.gpu.memory)

    def gathered(self) -> int:
        """The largest parameter (the experts of a layer), gathered and joined, and a bucket that is copied."""
        a = self.resolved.architecture
        experts = a.n_routed_experts * 2 * a.moe_intermediate_size * a.hidden_size
        embedding = a.vocab_size * a.hidden_size
        whole = max(experts, embedding) * self.weight_bytes
        return 2 * whole + 2 * self.resolved.config.rollout.update_weight_buffer_size


class HostModel(MemoryModel):
    """The machines."""

    def plan(self) -> tuple[PhaseMemory, ...]:
        """All phases, each on the machine that is fullest in it."""
        config = self.resolved.config
        phases = [Phase.RESUME, Phase.TRAINING, Phase.UPDATE_WEIGHTS, Phase.ROLLOUT, Phase.SAVE]
        if not config.needs_engine:
            phases = [Phase.RESUME, Phase.TRAINING, Phase.SAVE]
        found = []
        for phase in phases:
            machines = [self.phase(phase, machine) for machine in range(config.cluster.actor_num_nodes)]
            found.append(min(machines, key=lambda one: one.margin))
        return tuple(found)

    def ranks(self, machine: int) -> Iterator[StageShard]:
        """The stages of a machine's ranks: stages are the outermost dimension of megatron's rank order."""
        each = self.resolved.config.cluster.actor_num_gpus_per_node
        for rank in range(machine * each, (machine + 1) * each):
            yield self.shards[rank * self.layout.pp // self.layout.world]

    def phase(self, phase: Phase, machine: int) -> PhaseMemory:
        """One machine in one phase."""
        ranks = list(self.ranks(machine))
        parts: list[Mapping[Use, int]] = [self.always(machine, ranks)]
        if not self.on_gpu:
            parts += [self.held(shard) for shard in ranks]
            if phase is Phase.TRAINING:
                parts += [self.computing(shard) for shard in ranks]
        if phase is Phase.TRAINING and self.resolved.config.needs_reference:
            parts += [{Use.REFERENCE: sum(self.held(shard)[Use.WEIGHTS] for shard in ranks)}]
        if phase is Phase.SAVE:
            parts += [{Use.CHECKPOINT: self.copied_for_save(ranks)}]
        if phase is Phase.RESUME:
            parts += [{Use.CHECKPOINT: sum(map(self.across_ranks, ranks))}]
        if phase is Phase.UPDATE_WEIGHTS and not self.on_gpu:
            whole = sum(self.held(shard)[Use.WEIGHTS] for shard in self.shards)
            parts += [{Use.BUFFERS: 2 * min(whole, self.resolved.config.rollout.update_weight_buffer_size)}]
        return PhaseMemory(phase, _sum(parts), self.machine.host_memory)

    def always(self, machine: int, ranks: list[StageShard]) -> dict[Use, int]:
        """What is there in every phase."""
        config = self.resolved.config
        uses = {Use.PROCESSES: self.process_bytes(machine, len(ranks))}
        if self.offloaded and self.on_gpu:
            state = sum(shard.optimizer_elements for shard in ranks) * self.state_bytes
            slots = 2 * SLOT_ELEMENTS * (FP32 + self.weight_bytes) * len(ranks)
            uses[Use.OPTIMIZER] = int(state * self.offloaded) + slots
        if config.grpo.replays_routing:
            uses[Use.ROUTING] = self.routing()
        if config.needs_reference:
            uses[Use.REFERENCE] = sum(self.held(shard)[Use.WEIGHTS] for shard in ranks)
        if not self.on_gpu and config.needs_engine:
            engines = -(-config.num_engines // config.cluster.actor_num_nodes)
            uses[Use.ENGINE_WEIGHTS] = engines * sum(self.held(shard)[Use.WEIGHTS] for shard in self.shards)
        return uses

    def routing(self) -> int:
        """Where tokens are taken: of the longest samples, a byte an expert, with the driver, on their way and with the
        ranks; and of all that the engines' caches hold, where SGLang keeps 4 bytes for each layer, dense ones too."""
        config, a = self.resolved.config, self.resolved.architecture
        samples = config.rollout.draw_size * config.rollout.n_samples_per_prompt
        held = 3 * samples * longest_sample(self.resolved) * sum(a.moe_layer_freq) * a.num_experts_per_tok
        engine = GpuModel(self.resolved, self.machine, self.on_gpu, self.pack).engine_memory if self.on_gpu else None
        if engine is not None and config.grpo.replays_rollouts:
            gpus = -(-config.rollout_gpus // config.cluster.actor_num_nodes)
            held += gpus * engine.tokens * a.num_hidden_layers * a.num_experts_per_tok * 4
        return held

    def process_bytes(self, machine: int, ranks: int) -> int:
        """Host memory of the programs themselves, a process of an engine for each of its GPUs."""
        config = self.resolved.config
        if not self.on_gpu:
            engines = -(-config.num_engines // config.cluster.actor_num_nodes)
            return constants.CPU_DRIVER_HOST + (ranks + engines) * constants.CPU_PROCESS_HOST
        engines = engine_gpus_of(config, machine) * constants.ENGINE_HOST
        return constants.DRIVER_HOST + ranks * constants.RANK_HOST + engines

    def copied_for_save(self, ranks: list[StageShard]) -> int:
        """Optimizer state that is copied for a checkpoint."""
        total = sum(map(self.across_ranks, ranks))
        if self.resolved.config.checkpoint.async_save:
            held = sum(shard.optimizer_elements * 12 for shard in ranks)
            total += held + sum(self.held(shard)[Use.WEIGHTS] for shard in ranks) // max(1, self.layout.dense_replicas)
        return total

    def across_ranks(self, shard: StageShard) -> int:
        """Optimizer state of parameters that lie on several ranks, which is put together to be written, and read whole
        (`recipe.megatron.optimizer_state`); all other lies in its place."""
        return 12 * sum(chunk.across for chunk in shard.chunks)


def _sum(parts: list[Mapping[Use, int]]) -> dict[Use, int]:
    """Uses added up, in the order of `Use`; those of nothing left out."""
    total = {use: sum(part.get(use, 0) for part in parts) for use in Use}
    return {use: size for use, size in total.items() if size}
