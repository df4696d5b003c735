"""Every layout computes the same gradients: what one process does with a batch, several do together."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config

from recipe.messages import Progress, StepReport, TrainSample

STEPS = 3
MTP = {"mtp_num_layers": 1, "enable_mtp_training": True}


def train_and_save(trainer, samples: list[TrainSample], folder: Path) -> tuple[list[StepReport], dict]:
    """Saves after the first step: Adam's first moment is then a tenth of the clipped gradient, parameter by parameter
    and in one form for all layouts."""
    trainer.load()
    shards = scheduled(trainer, samples)
    from megatron.core.dist_checkpointing import load_plain_tensors

    reports = [trainer.train_step(shards)]
    trainer.save(folder, Progress(rollouts=1))
    saved = load_plain_tensors(str(folder / "iter_0000001"))
    reports += [trainer.train_step(shards) for _ in range(STEPS - 1)]
    return reports, {name: tensor for name, tensor in saved.items() if torch.is_tensor(tensor)}


def run_layout(folder: Path, ranks: int, perf: dict) -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    config = tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf,
        mtp=MTP,
    )
    samples = [replace(sample, is_shown=sample.index % 3 == 0) for sample in random_samples(8, seed=3)]
    of_ranks = on_ranks(train_and_save, config, samples, folder)
    steps = zip(*(reports for reports, _ in of_ranks), strict=True)
    shown = [{key: value for report in step for key, value in report.shown_log_probs.items()} for step in steps]
    reports, saved = of_ranks[0]
    return [replace(one, shown_log_probs=told) for one, told in zip(reports, shown, strict=True)], saved


@cache
def single_process() -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    import tempfile

    return run_layout(Path(tempfile.mkdtemp(prefix="single-")), 1, {})


GATHERS = {"moe_permute_fusion": True}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "perf"),
    [
        pytest.param(1, {"attention_backend": "unfused"} | GATHERS, id="unfused-permute-fusion"),
        pytest.param(2, {}, id="DP2"),
        pytest.param(2, {"expert_model_parallel_size": 2}, id="EP2"),
        pytest.param(2, {"expert_model_parallel_size": 2} | ALLGATHER, id="EP2-allgather"),
        pytest.param(2, {"expert_model_parallel_size": 2} | GATHERS, id="EP2-permute-fusion"),
        pytest.param(2, TP2, id="TP2+SP"),
        pytest.param(2, TP2 | {"expert_tensor_parallel_size": 2}, id="TP2+SP+ETP2"),
        pytest.param(2, TP2 | {"expert_model_parallel_size": 2}, id="TP2+SP+EP2"),
        pytest.param(2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}, id="PP2-uneven"),
        pytest.param(2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, id="PP2xVPP2"),
        pytest.param(
            2,
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
                "max_tokens_per_gpu": 50,
            },
            id="PP2xVPP2-odd-number-of-packs",
        ),
        pytest.param(2, {"context_parallel_size": 2}, id="CP2"),
        pytest.param(
            2,
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            id="DP2-recompute",
        ),
        pytest.param(4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="DP2xEP2xPP2"),
        pytest.param(
            8,
            TP2
            | GATHERS
            | {
                "pipeline_model_parallel_size": 2,
                "context_parallel_size": 2,
                "expert_model_parallel_size": 4,
                "decoder_last_pipeline_num_layers": 1,
            },
            id="16-gpu-recipe-twin-TP2xPP2xCP2xEP4",
        ),
        pytest.param(4, TP2 | {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="TP2xEP2xPP2"),
        pytest.param(4, TP2 | {"expert_model_parallel_size": 4} | ALLGATHER, id="DP2xTP2+SP+EP4-allgather"),
    ],
)
def test_gradients_and_losses_equal_a_single_process(ranks: int, perf: dict, tmp_path: Path) -> None:
    expected_reports, expected = single_process()
    reports, found = run_layout(tmp_path, ranks, perf)
    assert found.keys() == expected.keys()
    gradients = [name for name in expected if "exp_avg." in name]
    assert len(gradients) > 50
    for name in gradients:
        scale = expected[name].abs().max().clamp_min(1e-12)
        difference = ((found[name] - expected[name]).abs().max() / scale).item()
        assert difference < 1e-5, f"{name} differs by {difference:.1e} of its largest value"
    for ours, single in zip(reports, expected_reports, strict=True):
        assert ours.metrics.keys() == single.metrics.keys() >= {"mtp_loss"}
        for metric, value in single.metrics.items():
            exact = metric in ("grad_norm", "mtp_loss", "mtp_grad_norm")
            np.testing.assert_allclose(ours.metrics[metric], value, rtol=1e-5, atol=0 if exact else 1e-6)
        for found_one, expected_one in zip(ours.by_source, single.by_source, strict=True):
            assert found_one.tokens == expected_one.tokens > 0
            np.testing.assert_allclose(found_one.total, expected_one.total, rtol=1e-5)
        assert ours.shown_log_probs.keys() == single.shown_log_probs.keys() == {0, 3, 6}
        for index, log_probs in single.shown_log_probs.items():
            np.testing.assert_allclose(ours.shown_log_probs[index], log_probs, rtol=1e-4, atol=1e-5)


def one_step(trainer, samples: list[TrainSample]) -> StepReport:
    trainer.load()
    return trainer.train_step(scheduled(trainer, samples))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "perf"),
    [(2, {"context_parallel_size": 2}), (2, TP2), (4, TP2 | {"context_parallel_size": 2})],
    ids=["CP2", "TP2+SP", "TP2xCP2"],
)
def test_a_sequence_has_one_ratio_wherever_its_tokens_lie(ranks: int, perf: dict) -> None:
    """GSPO, with old log-probs about those of the model, within wide clips."""
    draw = np.random.default_rng(1)
    samples = [
        replace(sample, old_log_probs=draw.normal(-4.8, 0.5, sample.response_length).astype(np.float32))
        for sample in random_samples(8, seed=3)
    ]

    def report(count: int, settings: dict, estimator: str = "gspo") -> StepReport:
        config = tiny_config(
            random_checkpoint(),
            cluster={"actor_num_gpus_per_node": count},
            perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | settings,
            grpo={"advantage_estimator": estimator, "eps_clip": 0.9, "eps_clip_high": 20.0},
        )
        return on_ranks(one_step, config, samples)[0]

    expected, found = report(1, {}), report(ranks, perf)
    assert report(1, {}, "grpo").metrics["ratio"] != pytest.approx(expected.metrics["ratio"], rel=0.01)
    assert expected.metrics["clip_share"] < 0.5
    for metric in ("loss", "ratio", "clip_share", "grad_norm"):
        np.testing.assert_allclose(found.metrics[metric], expected.metrics[metric], rtol=1e-4, atol=1e-6)


def root_weights(trainer: list[torch.Tensor], engine: list[torch.Tensor], trained: list[torch.Tensor]) -> list:
    """A user's own: the root of each token's ratio to the engine, times that of its sequence."""
    return [((a - b) / 2 + (a - b).mean()).exp().clamp(0.1, 3) for a, b in zip(trainer, engine, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "correction",
    [
        {"use_tis": True, "tis_level": "geometric", "tis_clip": 2.0, "use_opsm": True, "opsm_delta": 0.5},
        {"custom_tis_function_path": "test_layouts:root_weights"},
    ],
    ids=["geometric-opsm", "custom"],
)
def test_a_sequence_is_corrected_as_one_wherever_its_tokens_lie(correction: dict) -> None:
    draw = np.random.default_rng(2)
    samples = [
        replace(sample, rollout_log_probs=draw.normal(-4.8, 1.0, sample.response_length).astype(np.float32))
        for sample in random_samples(8, seed=3)
    ]

    def report(count: int, settings: dict) -> StepReport:
        config = tiny_config(
            random_checkpoint(),
            cluster={"actor_num_gpus_per_node": count},
            perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | settings,
            grpo=correction,
        )
        return on_ranks(one_step, config, samples)[0]

    expected, found = report(1, {}), report(4, TP2 | {"context_parallel_size": 2})
    names = {"loss", "tis_weight", "grad_norm"} | ({"opsm_share", "tis_clip_share"} & expected.metrics.keys())
    for metric in names:
        assert expected.metrics[metric] not in (0, 1)
        np.testing.assert_allclose(found.metrics[metric], expected.metrics[metric], rtol=1e-4, atol=1e-6)
