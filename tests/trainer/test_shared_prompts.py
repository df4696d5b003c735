"""A pack that holds a prompt once for all its responses computes what separate sequences do."""

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, tiny_config

from recipe.messages import TrainSample

MTP = {"mtp_num_layers": 1, "enable_mtp_training": True}


def gradients(trainer, packs: list[list[TrainSample]]) -> dict[str, torch.Tensor]:
    from recipe.megatron.step import forward_backward

    trainer.load()
    forward_backward(trainer.replicas, packs, trainer.loss_function)
    return {name: parameter.main_grad.clone() for name, parameter in trainer.chunks[0].named_parameters()}


@pytest.mark.slow
def test_gradients_equal_those_of_separate_sequences() -> None:
    """The MTP layer's too, which reads whole sequences."""
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    samples = random_samples(9, seed=5)
    packs = [samples[:5], samples[5:]]
    tokens = sum(build_microbatch(pack, TokenLayout()).inputs.input_ids.numel() for pack in packs)
    assert tokens < sum(sample.length for sample in samples) - len(samples)
    config = tiny_config(random_checkpoint(), grpo={"entropy_coef": 0.01}, mtp=MTP)
    [together] = on_ranks(gradients, config, packs)
    [alone] = on_ranks(gradients, config, [[sample] for sample in samples])
    for name, gradient in alone.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert ((together[name] - gradient).abs().max() / scale).item() < 1e-5, name


def test_a_response_of_one_token_is_predicted_by_its_prompt() -> None:
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    samples = [TrainSample(n, np.array([3, 4, 5 + n]), np.array([True]), weight=1.0) for n in range(2)]
    batch = build_microbatch(samples, TokenLayout())
    assert batch.inputs.input_ids.tolist() == [[3, 4]]
    assert batch.inputs.ask.index.tolist() == [1, 1]
    assert batch.inputs.ask.targets.tolist() == [5, 6]
