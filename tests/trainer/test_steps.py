"""What an optimizer step promises: no harm from gradients that are not finite, the same from host memory, and saves
that never cost the last good checkpoint."""

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config, weights_of

from recipe.megatron import adam
from recipe.megatron.adam import Adam, MasterAdam
from recipe.megatron.rank import missing_bytes
from recipe.messages import Progress, StepReport, TrainSample
from recipe.system import memory
from recipe.system.errors import UserError

pytestmark = pytest.mark.slow


def poisoned_then_healthy(trainer, samples: list[TrainSample]) -> tuple[StepReport, bool, StepReport, bool]:
    trainer.load()
    before = weights_of(trainer)
    endless = replace(samples[0], advantages=np.full_like(samples[0].advantages, np.inf))
    poisoned = trainer.train_step(scheduled(trainer, [endless, *samples[1:]]))
    unharmed = all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    healthy = trainer.train_step(scheduled(trainer, samples))
    moved = any(not torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    return poisoned, unharmed, healthy, moved


def test_an_infinite_gradient_of_one_rank_skips_the_step_on_all() -> None:
    config = tiny_config(random_checkpoint(), cluster={"actor_num_gpus_per_node": 2})
    for poisoned, unharmed, healthy, moved in on_ranks(poisoned_then_healthy, config, random_samples(8, seed=2)):
        assert poisoned.skipped
        assert unharmed
        assert not healthy.skipped
        assert np.isfinite(healthy.metrics["grad_norm"])
        assert moved


def step_with_shown(trainer, samples: list[TrainSample]) -> tuple[dict, dict]:
    trainer.load()
    packs = scheduled(trainer, samples)
    return trainer.log_probs(packs).log_probs, trainer.train_step(packs).shown_log_probs


def test_a_step_tells_the_log_probs_before_it_of_the_samples_that_are_shown() -> None:
    samples = [replace(sample, is_shown=sample.index in (1, 6)) for sample in random_samples(8, seed=2)]
    ((before, shown),) = on_ranks(step_with_shown, tiny_config(random_checkpoint()), samples)
    assert shown.keys() == {1, 6}
    for index, log_probs in shown.items():
        np.testing.assert_allclose(log_probs, before[index], rtol=1e-6, atol=1e-6)


def three_steps(trainer, samples: list[TrainSample]) -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    trainer.load()
    reports = [trainer.train_step(scheduled(trainer, samples)) for _ in range(3)]
    return reports, weights_of(trainer)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_adam_in_host_memory_takes_the_same_steps(fraction: float) -> None:
    samples = random_samples(8, seed=4)
    offload = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }
    [(on_device, expected)] = on_ranks(three_steps, tiny_config(random_checkpoint()), samples)
    [(in_host, found)] = on_ranks(three_steps, tiny_config(random_checkpoint(), optimizer=offload), samples)
    assert [report.metrics["grad_norm"] for report in in_host] == pytest.approx(
        [report.metrics["grad_norm"] for report in on_device]
    )
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)  # a thousandth of a step


def adam_of(sizes: list[int], fraction: float) -> tuple[list[torch.nn.Parameter], Adam]:
    generator = torch.Generator().manual_seed(8)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator).bfloat16()) for size in sizes]
    optimizer = MasterAdam(parameters, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    optimizer.offload(fraction)
    optimizer.allocate()
    optimizer.begin()
    return parameters, optimizer


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_a_share_of_the_optimizer_is_offloaded(fraction: float) -> None:
    """The share that was asked for, as the plan counts it, to 5%; what stays takes the same steps."""
    sizes = [100, 7, 64, 300, 1, 128]
    parameters, optimizer = adam_of(sizes, fraction)
    assert optimizer.needed_host_bytes / 12 == pytest.approx(fraction * sum(sizes), abs=0.05 * sum(sizes))
    expected, whole = adam_of(sizes, 1.0)
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        for mine, other in zip(parameters, expected, strict=True):
            mine.decoupled_grad = other.decoupled_grad = torch.randn(mine.shape, generator=generator)
        optimizer.step()
        whole.step()
    for mine, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(optimizer.state[mine], whole.state[other], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_few_large_parameters_do_not_offload_more_than_asked(fraction: float) -> None:
    """Embedding and head hold most of what is no expert; all that comes between them is small."""
    sizes = [317, *[20, 3, 9] * 6, 317]
    _, optimizer = adam_of(sizes, fraction)
    assert optimizer.needed_host_bytes / 12 == pytest.approx(fraction * sum(sizes), abs=0.05 * sum(sizes))


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that is allocated and not filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_a_first_step_begins_without_momentum_from_the_weights() -> None:
    parameters, optimizer = adam_of([100, 7], 0.5)
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert torch.equal(state["master_param"], parameter.float())
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_master_weights_come_over_the_bus_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "SLOT_ELEMENTS", 16)
    weights = [torch.randn(size).bfloat16() for size in (16, 1, 100, 48)]
    masters = [torch.full(weight.shape, torch.nan) for weight in weights]
    adam._Stage(torch.bfloat16).fill(list(zip(weights, masters, strict=True)))
    assert all(torch.equal(master, weight.float()) for weight, master in zip(weights, masters, strict=True))


@pytest.mark.parametrize(
    ("peak", "allocated", "reserved", "missing"),
    [
        (0, 100, 100, 0),  # no step was made yet
        (300, 100, 110, 204),  # an engine had the memory
        (300, 100, 205, 0),  # nobody had it
        (300, 310, 310, 0),
    ],
)
def test_a_step_gets_back_what_an_engine_had(peak: int, allocated: int, reserved: int, missing: int) -> None:
    assert missing_bytes(peak, allocated, reserved) == missing


def test_memory_that_is_not_there_is_told_before_it_is_used() -> None:
    memory.require_host_memory(1000, "the optimizer", "use more machines")
    with pytest.raises(UserError, match=r"the optimizer needs 1000000.0 GB .* available: use more machines"):
        memory.require_host_memory(10**15, "the optimizer", "use more machines")


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 300\nactive_file 500\nslab 300\n")
    assert memory.available_bytes(tmp_path) == 3800
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) > 10**6


def save_on_a_full_disk(trainer, folder: Path) -> tuple[str, int]:
    from recipe.system.errors import UserError

    trainer.load()
    trainer.save(folder, Progress(rollouts=1))
    largest, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        trainer.save(folder, Progress(rollouts=2))
    except UserError as error:
        told = str(error)
    else:
        told = "nothing"
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    object.__setattr__(trainer.config.checkpoint, "load", folder)
    return told, trainer.load().rollouts


def test_a_disk_that_fills_while_saving_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    [(told, loaded)] = on_ranks(save_on_a_full_disk, tiny_config(random_checkpoint()), tmp_path)
    assert "cannot be written" in told
    assert "the last good checkpoint is whole" in told
    assert loaded == 1
