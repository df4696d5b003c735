"""The whole configuration of a run: one frozen object, and what follows from it."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field
from pydantic.fields import FieldInfo

from recipe.config.fields import Group
from recipe.config.groups_rollout import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    MiscConfig,
    RolloutConfig,
    SglangConfig,
)
from recipe.config.groups_training import (
    CheckpointConfig,
    GrpoConfig,
    ModelConfig,
    MtpConfig,
    OptimizerConfig,
    PerfConfig,
)


class Config(Group):
    """Everything a run is told. Made by `recipe.config.resolve`, which also checks what no single field can."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """The machines."""
    model: ModelConfig
    """The checkpoint that is trained."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Where training starts, and what is kept."""
    data: DataConfig
    """The prompt files."""
    rollout: RolloutConfig
    """Generation and grading."""
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    """The loss."""
    optimizer: OptimizerConfig
    """Adam and its schedule."""
    perf: PerfConfig = Field(default_factory=PerfConfig)
    """Parallel layout and memory."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation on held-out prompts."""
    sglang: SglangConfig = Field(default_factory=SglangConfig)
    """The SGLang servers."""
    mtp: MtpConfig = Field(default_factory=MtpConfig)
    """The multi-token-prediction layer."""
    misc: MiscConfig = Field(default_factory=MiscConfig)
    """The run, and numerics that are fixed."""

    @property
    def world_size(self) -> int:
        """Training ranks."""
        return self.cluster.actor_num_nodes * self.cluster.actor_num_gpus_per_node

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model outside its experts and share its sequences: TP x PP x CP."""
        perf = self.perf
        return perf.tensor_model_parallel_size * perf.pipeline_model_parallel_size * perf.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that see different samples."""
        return self.world_size // self.model_parallel_size

    @property
    def needs_engine(self) -> bool:
        """Whether anything is generated: rollouts, or evaluation beside supervised steps."""
        return not self.is_sft or bool(self.eval.eval_prompt_data)

    @property
    def rollout_gpus(self) -> int:
        """GPUs of all engines; without a number, SGLang takes the trainer's, and there is one embedded engine."""
        if self.cluster.rollout_num_gpus is not None:
            return self.cluster.rollout_num_gpus
        return self.world_size if self.rollout.engine == "sglang" else self.sglang.rollout_num_gpus_per_engine

    @property
    def paid_for(self) -> int:
        """GPUs that the run takes; machines, where it takes none."""
        if self.cluster.device == "cpu":
            return self.cluster.actor_num_nodes
        return self.world_size + (self.rollout_gpus if self.needs_engine and not self.cluster.colocate else 0)

    @property
    def num_engines(self) -> int:
        """Rollout servers."""
        return self.rollout_gpus // self.sglang.rollout_num_gpus_per_engine if self.needs_engine else 0

    @property
    def samples_per_rollout(self) -> int:
        """Samples of one rollout."""
        return self.rollout.rollout_batch_size * self.rollout.n_samples_per_prompt

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.rollout.global_batch_size or self.samples_per_rollout

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout's samples."""
        return self.samples_per_rollout // self.global_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.rollout.num_rollout * self.steps_per_rollout

    @property
    def is_sft(self) -> bool:
        """Whether the run learns given responses, without rollouts."""
        return self.grpo.loss_type == "sft"

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model's log-probs change anything: a KL coefficient above 0 is in use."""
        kl_in_loss = self.grpo.use_kl_loss and self.grpo.kl_loss_coef > 0
        return not self.is_sft and (kl_in_loss or self.grpo.kl_coef > 0)

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether log-probs before the first step are worth a pass of their own: with one step a rollout they are
        the loss pass's own (the ratio is 1), unless a KL in the reward needs them before the advantages."""
        return not self.is_sft and (self.steps_per_rollout > 1 or self.grpo.kl_coef > 0)

    @property
    def records_routing(self) -> bool:
        """Whether the old-log-prob pass is to tell which experts it took."""
        return self.grpo.use_routing_replay and not self.grpo.replays_rollouts

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.misc.runs_dir / self.misc.name

    @property
    def save_dir(self) -> Path:
        """Where training checkpoints go."""
        return self.checkpoint.save or self.run_dir / "checkpoints"


GROUPS: dict[str, type[Group]] = {
    name: group.annotation
    for name, group in Config.model_fields.items()
    if isinstance(group.annotation, type) and issubclass(group.annotation, Group)
}
"""The groups by name, in the order of Config."""


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every field of every group under its dotted key, `optimizer.lr`."""
    for name, group in GROUPS.items():
        for field_name, field in group.model_fields.items():
            yield f"{name}.{field_name}", field
