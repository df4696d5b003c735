"""Training the MTP layer beside the policy is no concern of the policy."""

from dataclasses import replace

import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config

from recipe.messages import StepReport, TrainSample

pytestmark = pytest.mark.slow

STEPS = 3
MTP_LAYER = "model.layers.4."
"""The tiny model has four decoder layers, 0 to 3."""


def train(trainer, samples: list[TrainSample]) -> tuple[list[StepReport], dict[str, torch.Tensor]]:
    trainer.load()
    shards = scheduled(trainer, samples)
    reports = [trainer.train_step(shards) for _ in range(STEPS)]
    return reports, {name: weight.clone() for name, weight in trainer.weights()}


@pytest.mark.parametrize(
    ("ranks", "perf"),
    [
        pytest.param(1, {}, id="single"),
        pytest.param(2, {}, id="DP2"),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP2+SP"),
        pytest.param(2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}, id="PP2"),
        pytest.param(2, {"context_parallel_size": 2}, id="CP2"),
    ],
)
def test_the_policy_takes_the_same_steps_bit_for_bit(ranks: int, perf: dict) -> None:
    """Clipping binds in every step, so a norm that counted the MTP layer would show."""
    samples = random_samples(8, seed=6)

    def run(*, trained: bool) -> list[tuple[list[StepReport], dict[str, torch.Tensor]]]:
        config = tiny_config(
            random_checkpoint(),
            cluster={"actor_num_gpus_per_node": ranks},
            perf=perf,
            mtp={"mtp_num_layers": 1, "enable_mtp_training": trained},
            optimizer={"clip_grad": 0.01},
        )
        return on_ranks(train, config, samples)

    for (with_it, weights), (without, expected) in zip(run(trained=True), run(trained=False), strict=True):
        of_mtp = [{name: report.metrics[name] for name in ("mtp_loss", "mtp_grad_norm")} for report in with_it]
        assert [report.metrics for report in with_it] == [
            report.metrics | mtp for report, mtp in zip(without, of_mtp, strict=True)
        ]
        assert all(report.metrics["grad_norm"] > 0.01 for report in without)
        assert all(mtp["mtp_grad_norm"] > 0.01 for mtp in of_mtp)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            is_mtp = name.startswith(MTP_LAYER)
            if is_mtp and "e_score_correction_bias" not in name:
                assert not torch.equal(weight, expected[name]), f"{name} was not trained"
            elif not is_mtp:
                assert torch.equal(weight, expected[name]), f"{name} differs"


@pytest.mark.parametrize("context_size", [1, 2])
def test_what_it_learns_has_weights_of_its_own(context_size: int) -> None:
    """Of samples that share prompts or lie whole, over all context-parallel ranks: each learned token once."""
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    samples = [replace(sample, mtp_weight=sample.index + 1.0) for sample in random_samples(5, seed=4)]
    expected = [
        (sample.mtp_weight, token)
        for sample in samples
        for token, learned in zip(sample.response.tolist(), sample.mtp_mask, strict=True)
        if learned
    ]
    found: list[tuple[float, int]] = []
    for rank in range(context_size):
        layout = TokenLayout(context_rank=rank, context_size=context_size, with_mtp=True)
        batch = build_microbatch(samples, layout)
        assert batch.inputs.mtp is not None
        assert batch.mtp_weights is not None
        found += zip(batch.mtp_weights.tolist(), batch.inputs.mtp.ask.targets.tolist(), strict=True)
    assert sorted(found) == sorted(expected)
