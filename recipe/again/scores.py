"""A step's samples once more through the trainer."""

from collections.abc import Sequence
from pathlib import Path

from recipe.again.alone import alone, in_process, packed, policy_alone, with_changes
from recipe.config import Architecture, Config
from recipe.messages import Scores, TrainSample


def scores(
    config: Config,
    architecture: Architecture,
    weights: Path | None,
    samples: Sequence[TrainSample],
    *,
    bf16: bool,
    export: Path | None = None,
) -> Scores:
    """Log-probs of the samples' responses by the trainer of a run, and the experts that it took them to: where the
    samples say, or by itself. `export`: where its weights are written in Hugging Face's form. Raises UserError for
    weights that cannot be read."""
    settings = settings_of(config, weights, bf16=bf16)
    return in_process(_scores, settings, architecture, list(samples), export)


def settings_of(config: Config, weights: Path | None, *, bf16: bool) -> Config:
    """Those of a run whose trainer only scores: no reference model, and in fp32 no attention that lacks it."""
    lacks_fp32 = not bf16 and config.perf.attention_backend != "unfused"
    return with_changes(
        alone(config, weights),
        model={"bf16": bf16},
        perf={"attention_backend": "auto"} if lacks_fp32 else {},
        grpo={"use_kl_loss": False, "kl_coef": 0.0, "use_rollout_routing_replay": False, "use_routing_replay": True},
    )


def _scores(config: Config, architecture: Architecture, samples: list[TrainSample], export: Path | None) -> Scores:
    with policy_alone(config, architecture) as rank:
        if export is not None:
            rank.export_hugging_face(export)
        return rank.log_probs(packed(samples, config))
