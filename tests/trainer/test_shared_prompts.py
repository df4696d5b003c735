"""A pack that holds a prompt once for all its responses computes what separate sequences do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, tiny_config

from recipe.messages import TrainSample


def gradients(trainer, samples: list[TrainSample], share_prompts: bool) -> tuple[dict[str, torch.Tensor], int]:
    from recipe.megatron import step
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    trainer.load()
    layout = replace(TokenLayout(), share_prompts=share_prompts)
    step.token_layout = lambda share_prompts: layout
    step.forward_backward(trainer.replicas, [samples[:5], samples[5:]], trainer.loss_function)
    tokens = sum(build_microbatch(part, layout).inputs.input_ids.numel() for part in (samples[:5], samples[5:]))
    trained = (item for item in trainer.chunks[0].named_parameters() if item[1].requires_grad)
    return {name: parameter.main_grad.clone() for name, parameter in trained}, tokens


@pytest.mark.slow
def test_gradients_equal_those_of_separate_sequences() -> None:
    samples = random_samples(9, seed=5)
    config = tiny_config(random_checkpoint(), grpo={"entropy_coef": 0.01})
    [(shared, shared_tokens)] = on_ranks(gradients, config, samples, True)
    [(separate, separate_tokens)] = on_ranks(gradients, config, samples, False)
    assert shared_tokens < separate_tokens
    assert shared.keys() == separate.keys()
    for name, gradient in separate.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert ((shared[name] - gradient).abs().max() / scale).item() < 1e-5, name


def test_a_response_of_one_token_is_predicted_by_its_prompt() -> None:
    from recipe.megatron.microbatch import TokenLayout, build_microbatch

    samples = [TrainSample(n, np.array([3, 4, 5 + n]), np.array([True]), weight=1.0) for n in range(2)]
    batch = build_microbatch(samples, TokenLayout())
    assert batch.inputs.input_ids.tolist() == [[3, 4]]
    assert batch.inputs.ask.index.tolist() == [1, 1]
    assert batch.inputs.ask.targets.tolist() == [5, 6]
