"""Every layout's logits are those of transformers, over the whole vocabulary, at every token of a pack that predicts
another."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from logits_support import Packs, on_ranks, random_checkpoint, random_packs, seen_logits, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from recipe.config import Config

LENGTHS = ((11, 4, 16), (2, 20), (13,))
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2_UNEVEN = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}


def log_prob_logits(trainer, packs: Packs) -> list[Tensor]:
    """Logits pack by pack; none on ranks that hold no output head."""
    trainer.load()
    with seen_logits() as seen:
        trainer.log_probs(packs)
    return seen


@cache
def transformers_logits() -> list[Tensor]:
    """Pack by pack, each sequence computed alone."""
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint(), dtype=torch.float32)

    def alone(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens[None]).logits[0, :-1]

    return [torch.cat([alone(torch.from_numpy(sample.tokens)) for sample in pack]) for pack in random_packs(*LENGTHS)]


def layout(ranks: int, perf: dict, checkpoint: Path | None = None) -> Config:
    perf = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf
    return tiny_config(checkpoint or random_checkpoint(), cluster={"actor_num_gpus_per_node": ranks}, perf=perf)


def check_logits(config: Config) -> None:
    seen_by = [seen for seen in on_ranks(log_prob_logits, config, random_packs(*LENGTHS)) if seen]
    assert seen_by
    for seen in seen_by:
        for found, expected in zip(seen, transformers_logits(), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("ranks", "perf"),
    [
        pytest.param(1, {}, id="TP1"),
        pytest.param(2, TP2, id="TP2+SP"),
        pytest.param(2, PP2_UNEVEN, id="PP2-uneven"),
        pytest.param(2, EP2, id="EP2"),
        pytest.param(2, TP2 | {"expert_tensor_parallel_size": 2}, id="TP2+SP+ETP2"),
    ],
)
def test_logits_of_packs_equal_transformers(ranks: int, perf: dict) -> None:
    check_logits(layout(ranks, perf))


def test_logits_survive_conversion_to_torch_dist(tmp_path: Path) -> None:
    """Converted by one process and read by two, which have no other source of weights."""
    command = [sys.executable, "-m", "recipe.conversion.convert", "--hf-checkpoint", str(random_checkpoint())]
    converted, without_weights = tmp_path / "converted", tmp_path / "hf"
    subprocess.run([*command, "--save", str(converted), "--mtp-num-layers", "1"], check=True)
    without_weights.mkdir()
    shutil.copy(random_checkpoint() / "config.json", without_weights)
    config = layout(2, TP2 | EP2, without_weights)
    starting_point = config.checkpoint.model_copy(update={"ref_load": converted})
    check_logits(config.model_copy(update={"checkpoint": starting_point}))
