"""A resumed run is the run that was never interrupted: bit for bit in the same layout, to rounding in another one."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config, weights_of

from recipe.config import Config
from recipe.messages import Progress, StepReport

pytestmark = pytest.mark.slow

STEPS = 4
SCHEDULE = {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 2, "lr_decay_iters": 6, "lr_decay_style": "cosine"}
TP2 = {"perf": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
IN_HOST = {
    "optimizer_cpu_offload": True,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "use_precision_aware_optimizer": True,
}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "single": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"perf": {"expert_model_parallel_size": 2}}),
    "TP2+SP": (2, TP2),
    "TP2+SP+EP2": (2, {"perf": TP2["perf"] | {"expert_model_parallel_size": 2}}),
    "PP2-uneven": (2, {"perf": {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}}),
    "offloaded": (1, {"optimizer": IN_HOST}),
    "bf16": (1, {"model": {"bf16": True}}),
    "bf16-offloaded": (1, {"model": {"bf16": True}, "optimizer": IN_HOST}),
}


@dataclass(frozen=True)
class Step:
    """A step, and the weights after it."""

    report: StepReport
    weights: dict[str, torch.Tensor]


def config_of(layout: str) -> Config:
    ranks, groups = LAYOUTS[layout]
    return tiny_config(
        random_checkpoint(),
        model={"hf_checkpoint": random_checkpoint(), "bf16": False} | groups.get("model", {}),
        cluster={"actor_num_gpus_per_node": ranks, "device": "cpu"},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | groups.get("perf", {}),
        optimizer=SCHEDULE | {"weight_decay": 0.1} | groups.get("optimizer", {}),
        mtp={"mtp_num_layers": 1, "enable_mtp_training": True},
    )


def take_step(trainer, number: int) -> Step:
    report = trainer.train_step(scheduled(trainer, random_samples(8, seed=number)))
    return Step(report, weights_of(trainer))


def steps_and_saves(trainer, folder: Path) -> list[Step]:
    trainer.load()
    steps = []
    for done in range(1, STEPS + 1):
        steps.append(take_step(trainer, done - 1))
        trainer.save(folder / str(done), progress_after(done, trainer))
    return steps


def progress_after(steps: int, trainer) -> Progress:
    """Of a run that takes two steps a rollout, as its ranks are told of it."""
    ahead = [{"rollout": steps, "groups": [{"index": 7}]}]
    progress = Progress((steps + 1) // 2, steps, data={"drawn": 8}, waiting=[{"index": 3}], ahead=ahead)
    return progress if trainer.is_first else progress.counts


@cache
def uninterrupted(layout: str) -> tuple[Path, list[Step]]:
    """A run's checkpoints, a folder each, and its steps."""
    folder = Path(tempfile.mkdtemp(prefix=f"{layout}-"))
    return folder, on_ranks(steps_and_saves, config_of(layout), folder)[0]


def load_after(trainer, folder: Path, done: int) -> None:
    object.__setattr__(trainer.config.checkpoint, "load", folder / str(done))
    assert trainer.load() == progress_after(done, trainer)


def resume_after_every_step(trainer, folder: Path) -> list[list[Step]]:
    """The last checkpoint first: an earlier one must then replace all that a later one and its steps left."""
    resumed = []
    for done in reversed(range(1, STEPS)):
        load_after(trainer, folder, done)
        resumed.append([take_step(trainer, number) for number in range(done, STEPS)])
    return resumed


@pytest.mark.parametrize("layout", ["single", "TP2+SP", "bf16-offloaded"])
def test_a_run_resumed_in_its_layout_goes_on_bit_for_bit(layout: str) -> None:
    folder, expected = uninterrupted(layout)
    assert len({step.report.metrics["lr"] for step in expected}) == STEPS
    for resumed in on_ranks(resume_after_every_step, config_of(layout), folder)[0]:
        for step, found in zip(expected[-len(resumed) :], resumed, strict=True):
            assert found.report == step.report
            assert found.weights.keys() == step.weights.keys()
            assert all(torch.equal(weight, step.weights[name]) for name, weight in found.weights.items())


def resume_and_spoil(trainer, folder: Path, done: int) -> tuple[list[StepReport], list[StepReport]]:
    """Two steps after a resume, and two after one that lost the moments."""
    load_after(trainer, folder, done)
    whole = [take_step(trainer, number).report for number in range(done, done + 2)]
    load_after(trainer, folder, done)
    for inner in trainer.optimization._inner():
        for state in inner.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    return whole, [take_step(trainer, number).report for number in range(done, done + 2)]


def largest_difference(found: list[StepReport], expected: list[Step]) -> float:
    """Of all losses and gradient norms, relative."""

    def numbers(report: StepReport) -> np.ndarray:
        return np.array([value for name, value in sorted(report.metrics.items()) if name != "lr"])

    ours, theirs = (np.stack([numbers(report) for report in run]) for run in (found, [s.report for s in expected]))
    return float((np.abs(ours - theirs) / np.abs(theirs).clip(1e-3)).max())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("EP2", "single"),
        ("TP2+SP", "single"),
        ("PP2-uneven", "single"),
        ("DP2", "single"),
        ("single", "TP2+SP+EP2"),
        ("single", "offloaded"),
    ],
)
def test_a_run_resumed_in_another_layout_goes_on(before: str, after: str) -> None:
    folder, expected = uninterrupted(before)
    whole, without_moments = on_ranks(resume_and_spoil, config_of(after), folder, 2)[0]
    assert largest_difference(whole, expected[2:]) < 1e-5
    assert largest_difference(without_moments, expected[2:]) > 1e-3
    assert [report.metrics["lr"] for report in whole] == [step.report.metrics["lr"] for step in expected[2:]]


def resume_with_and_without_moments(trainer, folder: Path, done: int) -> tuple[Step, Step]:
    load_after(trainer, folder, done)
    whole = take_step(trainer, done)
    load_after(trainer, folder, done)
    for inner in trainer.optimization._inner():
        for state in inner.state.values():
            state["exp_avg"].zero_()
    return whole, take_step(trainer, done)


def test_master_weights_move_from_the_host_to_the_device() -> None:
    """The two places step by different kernels, so that a bf16 weight in a million may round the other way."""
    folder, expected = uninterrupted("bf16-offloaded")
    whole, without_moments = on_ranks(resume_with_and_without_moments, config_of("bf16"), folder, 2)[0]
    theirs = expected[2].weights

    def differing(step: Step) -> int:
        return sum(int((weight != theirs[name]).sum()) for name, weight in step.weights.items())

    assert largest_difference([whole.report], expected[2:3]) < 1e-5
    assert differing(whole) <= 20
    assert differing(without_moments) > 1000


def resume_from_the_rounded_weights(trainer, folder: Path, done: int) -> Step:
    load_after(trainer, folder, done)
    for inner in trainer.optimization._inner():
        inner.reload_masters()
    return take_step(trainer, done)


def test_bf16_weights_alone_would_not_do() -> None:
    folder, expected = uninterrupted("bf16-offloaded")
    found = on_ranks(resume_from_the_rounded_weights, config_of("bf16-offloaded"), folder, 2)[0]
    assert any(not torch.equal(weight, expected[2].weights[name]) for name, weight in found.weights.items())


def optimizer_tensors(trainer) -> tuple[int, int, int]:
    """Elements of the optimizer that this rank would write and would read, and how many of the tensors to write are
    not the optimizer's own memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from recipe.megatron import checkpoint

    own = {state.untyped_storage().data_ptr() for state in trainer.optimization.state_tensors}
    own |= {weight.untyped_storage().data_ptr() for chunk in trainer.chunks for weight in chunk.parameters()}
    shards = nested_values(checkpoint.own_shards(trainer.chunks, trainer.optimization))
    written = [shard.data for shard in shards if shard.key.startswith("optimizer.")]
    model_state = checkpoint._model_state(trainer.chunks)
    to_read = checkpoint._optimizer_state(trainer.optimization, model_state, is_loading=True)
    read = [shard.data for shard in nested_values(to_read) if isinstance(shard, ShardedBase)]
    copies = sum(tensor.untyped_storage().data_ptr() not in own for tensor in written)
    return sum(tensor.numel() for tensor in written), sum(tensor.numel() for tensor in read), copies


@pytest.mark.parametrize("layout", ["single", "bf16-offloaded", "EP2", "DP2"])
def test_ranks_share_the_optimizers_writing_and_reading(layout: str) -> None:
    """Each writes the parameters that it holds most of, from where they lie, and reads those that it has a part of. Of
    two ranks one parameter at most lies on both."""
    ranks = on_ranks(optimizer_tensors, config_of(layout))
    written, read = sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)
    assert all(rank[0] > 0.3 * written for rank in ranks) or len(ranks) == 1
    assert written <= read < 1.4 * written
    assert sum(rank[2] for rank in ranks) <= 3 * (len(ranks) - 1)
