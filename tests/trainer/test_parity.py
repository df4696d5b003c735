"""The trainer computes what transformers computes."""

from functools import cache

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, tiny_config
from transformers import AutoModelForCausalLM

from recipe.messages import TrainSample

pytestmark = pytest.mark.smoke


def six_samples() -> list[TrainSample]:
    return random_samples(6, seed=1)


def rank_log_probs(trainer, samples: list[TrainSample]) -> dict[int, np.ndarray]:
    trainer.load()
    return trainer.log_probs([samples[:3], samples[3:]]).log_probs


@cache
def transformers_log_probs() -> dict[int, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint(), dtype=torch.float32)
    found = {}
    for sample in six_samples():
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(sample.tokens)[None]).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, torch.from_numpy(sample.tokens[1:])[:, None])[:, 0]
        found[sample.index] = chosen[-sample.response_length :].numpy()
    return found


@pytest.mark.parametrize(
    ("ranks", "perf"),
    [
        (1, {}),
        (2, {"expert_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
        (2, {"context_parallel_size": 2, "attention_backend": "unfused"}),
    ],
    ids=["single", "EP2", "TP2+SP", "PP2", "CP2", "CP2-unfused"],
)
def test_log_probs_of_a_pack_equal_transformers_one_by_one(ranks: int, perf: dict) -> None:
    config = tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf,
    )
    found: dict[int, np.ndarray] = {}
    for part in on_ranks(rank_log_probs, config, six_samples()):
        found |= part
    expected = transformers_log_probs()
    assert found.keys() == expected.keys()
    for index, values in expected.items():
        np.testing.assert_allclose(found[index], values, atol=2e-5, rtol=0)
