"""A step once more: as it was, and with something changed.

python -m recipe.train --replay-step runs/NAME:N [flags]

begins with the checkpoint before step N, its optimizer included, and learns again from the samples that the step kept,
in one process: once as the run was configured, and once with the flags. What is compared: every metric of the step, and
the update, the change of all fp32 weights that the step makes.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.again.alone import alone, in_process, packed, read_config, trainer_alone, weights_of
from recipe.config import Architecture, Config
from recipe.config.checks import problems_of
from recipe.config.error_text import refuse
from recipe.config.flags import parse_command_line
from recipe.config.loading import FLAG_SOURCE, Setting
from recipe.config.usage import REPLAY_STEP
from recipe.experience import optimizer_batches, with_log_probs
from recipe.grpo.advantages import response_advantages
from recipe.messages import TrainSample
from recipe.run.journal import Journal
from recipe.run.kept_steps import read_step
from recipe.run.metrics import Values, over_steps
from recipe.system.errors import UserError

OF_TIME = ("seconds_", "max_memory")
"""Metrics that two steps may differ in."""


@dataclass(frozen=True)
class Update:
    """What a step does to the weights."""

    norm: float
    apart: float = 0.0
    """Norm of the difference from the step as it was, as a share of that one's norm."""
    cosine: float = 1.0
    """Of the angle between the two."""


def replay_step(arguments: Sequence[str]) -> Iterator[str]:
    """The lines of the comparison that a command line asks for. Raises UserError for a step that was not kept, or flags
    that do not fit the run."""
    at = arguments.index(REPLAY_STEP)
    flags = [*arguments[:at], *arguments[at + 2 :]]
    run, step = _parsed("".join(arguments[at + 1 : at + 2]))
    settings = {key: Setting(value, FLAG_SOURCE) for key, value in parse_command_line(flags).values.items()}
    config, changed = read_config(run), read_config(run, settings)
    architecture = Architecture.from_checkpoint(config.model.hf_checkpoint)
    refuse(problems_of(changed, architecture))
    if config.is_sft or changed.is_sft:
        raise UserError(f"{REPLAY_STEP} is for rollouts, and sft has none")
    samples, weights = _samples(run, step), weights_of(config, step)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("first.pt", "second.pt")]
        first = _again(config, architecture, weights, samples, files[0])
        second = _again(changed, architecture, weights, samples, files[1]) if settings else None
        updates = _compared(files[0], files[1] if settings else None)
    measured = next((line for line in Journal(run / "metrics.jsonl").read() if line["step"] == step), {})
    yield f"step {step} of {run}, {len(samples)} samples" + (f"; changed: {' '.join(flags)}" if flags else "")
    yield from _table(measured, first, second, updates)


def _parsed(named: str) -> tuple[Path, int]:
    run, colon, step = named.rpartition(":")
    if not colon or not step.isdecimal() or int(step) < 1:
        raise UserError(f"{REPLAY_STEP} {named} is not of the form RUN:N, such as runs/tiny:27")
    return Path(run), int(step)


def _samples(run: Path, step: int) -> list[tuple[TrainSample, int, float]]:
    """The samples of a step, each with the number of its group and its reward."""
    kept = read_step(run, step)
    records = {line["index"]: line for line in Journal(run / "rollouts" / f"{step - 1:06}.jsonl").read()}
    missing = [sample.index for sample in kept.samples if sample.index not in records]
    if missing:
        raise UserError(f"{run}/rollouts/{step - 1:06}.jsonl lacks sample {missing[0]}: the run was gone on from since")
    of_sample = ((sample, records[sample.index]) for sample in kept.samples)
    return [(sample, int(record["group_index"]), float(record["reward"])) for sample, record in of_sample]


def _again(
    config: Config,
    architecture: Architecture,
    weights: Path | None,
    samples: list[tuple[TrainSample, int, float]],
    update: Path,
) -> Values:
    """The metrics of the step under this configuration; its update is written to a file."""
    learned = with_advantages(samples, config)
    if not config.grpo.replays_rollouts:
        learned = [replace(sample, routed_experts=None) for sample in learned]
    elif all(sample.routed_experts is None for sample in learned):
        raise UserError("--use-rollout-routing-replay: the engines of this run were not asked where they took tokens")
    return in_process(_take, alone(config, weights), architecture, learned, update)


def with_advantages(samples: Sequence[tuple[TrainSample, int, float]], config: Config) -> list[TrainSample]:
    """The samples, each given with its group and reward, with their advantages by the configured estimator."""
    grpo = config.grpo
    normalise = not (grpo.disable_grpo_std_normalization or grpo.dr_grpo)
    rewards: dict[int, list[float | None]] = {}
    for sample, group, reward in samples:
        rewards.setdefault(group, []).append(reward if sample.response_length else None)
    of_group = {
        group: iter(response_advantages(of_all, grpo.advantage_estimator, std_normalization=normalise))
        for group, of_all in rewards.items()
    }
    return [
        replace(sample, advantages=np.full(sample.response_length, next(of_group[group]), dtype=np.float32))
        for sample, group, _ in samples
    ]


def _take(config: Config, architecture: Architecture, samples: list[TrainSample], update: Path) -> dict[str, float]:
    import torch

    with trainer_alone(config, architecture) as rank:
        before = [weight.detach().cpu().clone() for weight in rank.optimization.masters]
        old = rank.log_probs(packed(samples, config)) if config.needs_old_log_probs else None
        reference = rank.reference_log_probs(packed(samples, config)) if config.needs_reference else None
        learned = with_log_probs(samples, old, reference, config.grpo)
        batches = optimizer_batches(learned, config)
        reports = [rank.train_step(packed(batch, config)) for batch in batches]
        changes = [now.detach().cpu() - then for now, then in zip(rank.optimization.masters, before, strict=True)]
        torch.save(changes, update)
    return over_steps([report.metrics for report in reports])


def _compared(first: Path, second: Path | None) -> list[Update]:
    """The updates of one or two steps."""
    import torch

    def read(path: Path) -> list[Any]:
        changes: list[Any] = torch.load(path, mmap=True)
        return changes

    one = read(first)
    other = one if second is None else read(second)
    if [len(tensor) for tensor in one] != [len(tensor) for tensor in other]:
        raise UserError("the two steps train different parameters: their updates cannot be compared")
    a, b, dot = (
        sum(float((x.double() * y.double()).sum()) for x, y in zip(*pair, strict=True))
        for pair in ((one, one), (other, other), (one, other))
    )
    if second is None:
        return [Update(math.sqrt(a))]
    apart = math.sqrt(max(0.0, a + b - 2 * dot) / a) if a else 0.0
    cosine = dot / math.sqrt(a * b) if a and b else 0.0
    return [Update(math.sqrt(a)), Update(math.sqrt(b), apart, cosine)]


def _table(
    measured: Mapping[str, Any], first: Values, second: Values | None, updates: Sequence[Update]
) -> Iterator[str]:
    columns = ["in the run", "once more"] + ["changed"] * (second is not None)
    yield f"{'':<22}" + "".join(f"{column:>14}" for column in columns)
    names = dict.fromkeys([*first, *(second or {})])
    for name in (name for name in names if not name.startswith(OF_TIME)):
        values = [measured.get(name), first.get(name), *([second.get(name)] if second is not None else [])]
        yield f"{name:<22}" + "".join(f"{'-' if one is None else f'{one:.6g}':>14}" for one in values)
    yield f"{'norm of the update':<22}" + "".join(f"{one:>14}" for one in ["-", *(f"{u.norm:.6g}" for u in updates)])
    if second is not None:
        yield (f"the two updates: {updates[1].apart:.1%} of the first one's norm apart, cosine {updates[1].cosine:.6f}")
