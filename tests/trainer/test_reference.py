"""The reference model is what training began with, costs nothing where no KL term asks for it, and leaves the policy
as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config

from recipe.messages import FloatArray, TrainSample

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
KL = {"kl_coef": 0.1}


def reference_and_policy(trainer, samples: list[TrainSample]) -> dict[str, dict[int, FloatArray]]:
    trainer.load()
    packs = scheduled(trainer, samples)
    found = {"began with": trainer.log_probs(packs).log_probs}
    found["reference at first"] = trainer.reference_log_probs(packs).log_probs
    for _ in range(2):
        trainer.train_step(packs)
    before = {name: weight.clone() for name, weight in trainer.weights()}
    found |= {"policy": trainer.log_probs(packs).log_probs, "reference": trainer.reference_log_probs(packs).log_probs}
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.weights())
    assert all(weight.device.type == "cpu" for weight in trainer.reference.values())
    return found


@pytest.mark.parametrize(("ranks", "perf"), [(1, {}), (2, TP2)], ids=["single", "TP2+SP"])
def test_the_reference_stays_while_the_policy_moves(ranks: int, perf: dict) -> None:
    config = tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks},
        perf=perf,
        grpo=KL,
        optimizer={"lr": 1e-2},
    )
    found = on_ranks(reference_and_policy, config, random_samples(6, seed=8))[0]
    for index, began in found["began with"].items():
        np.testing.assert_array_equal(found["reference at first"][index], began)
        np.testing.assert_array_equal(found["reference"][index], began)
        assert np.abs(found["policy"][index] - began).max() > 1e-3


def log_probs_of_both(trainer, samples: list[TrainSample]) -> tuple[dict[int, FloatArray], dict[int, FloatArray]]:
    trainer.load()
    packs = scheduled(trainer, samples)
    return trainer.log_probs(packs).log_probs, trainer.reference_log_probs(packs).log_probs


def other_weights(folder: Path) -> Path:
    """The checkpoint with an output head of half its size."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in random_checkpoint().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(random_checkpoint() / "model.safetensors")
    tensors["lm_head.weight"] *= 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_ref_load_is_the_reference_and_load_the_policy(tmp_path: Path) -> None:
    samples = random_samples(4, seed=9)
    other = other_weights(tmp_path / "other")
    paths = {"load": random_checkpoint(), "ref_load": other}
    config = tiny_config(random_checkpoint(), grpo=KL, checkpoint=paths)
    [(policy, reference)] = on_ranks(log_probs_of_both, config, samples)
    [(of_first, _)] = on_ranks(log_probs_of_both, tiny_config(random_checkpoint(), grpo=KL), samples)
    [(of_other, _)] = on_ranks(log_probs_of_both, tiny_config(other, grpo=KL), samples)
    for index in policy:
        np.testing.assert_array_equal(policy[index], of_first[index])
        np.testing.assert_array_equal(reference[index], of_other[index])
        assert np.abs(of_first[index] - of_other[index]).max() > 1e-3


def held(trainer) -> dict[str, torch.Tensor]:
    trainer.load()
    return trainer.reference


def test_without_a_kl_term_no_reference_is_held() -> None:
    [reference] = on_ranks(held, tiny_config(random_checkpoint(), grpo={"use_kl_loss": True, "kl_loss_coef": 0.0}))
    assert reference == {}
