"""Disk that checkpoints take, and what a run writes down of itself."""

from dataclasses import dataclass

from recipe.config import Config, Resolved
from recipe.plan import constants
from recipe.plan.hardware import Machine
from recipe.plan.shards import table_of

OPTIMIZER_BYTES = 12
"""Bytes a parameter of a training checkpoint beside its weight: master weight and two moments."""
TEXT_BYTES, SHOWN_BYTES = 6, 40
"""Bytes a response token in rollouts/, assumed (10 were measured of random tokens), and in tokens/, measured (39)."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes where checkpoints go."""

    checkpoint: int
    """Bytes of one training checkpoint."""
    saves: int
    """Checkpoints that the run writes."""
    kept: int
    """Checkpoints that are there at once, at most: a new one is whole before an old one goes."""
    export: int
    """Bytes of all Hugging Face exports."""
    records: int
    """Bytes of all samples, and of those that are kept token by token."""
    free: int | None
    """None: not known."""

    @property
    def needed(self) -> int:
        return self.checkpoint * self.kept + self.export + self.records

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free


def plan_disk(resolved: Resolved, machine: Machine) -> DiskPlan:
    """What the whole run writes."""
    config, settings = resolved.config, resolved.config.checkpoint
    parameters = mtp = 0
    for name, placement in table_of(resolved.architecture, bool(config.mtp.mtp_num_layers)).items():
        size = placement.elements
        parameters += size
        mtp += size * (name.startswith("mtp.") and not config.mtp.enable_mtp_training)
    weight = 2 if config.model.bf16 else 4
    rollouts, every = config.rollout.num_rollout, settings.save_interval
    saves = 1 if every is None else -(-rollouts // every)
    kept = saves if settings.save_keep is None else min(saves, settings.save_keep + 1)
    exports = (
        0
        if settings.save_hf is None
        else sum(settings.hugging_face_target(number, number == saves) is not None for number in range(1, saves + 1))
    )
    return DiskPlan(
        checkpoint=parameters * weight + (parameters - mtp) * OPTIMIZER_BYTES,
        saves=saves,
        kept=kept,
        export=exports * parameters * weight,
        records=0 if config.is_sft else rollouts * _records(config),
        free=machine.disk,
    )


def _records(config: Config) -> int:
    """Bytes of a rollout's samples, were they of the length that is assumed."""
    settings = config.rollout
    tokens = constants.MEAN_RESPONSE * settings.rollout_max_response_len * settings.n_samples_per_prompt
    shown = min(config.misc.keep_token_groups, settings.rollout_batch_size)
    return int(tokens * (settings.rollout_batch_size * TEXT_BYTES + shown * SHOWN_BYTES))
