"""The MTP layer computes what its published equations say, from token ids to logits, and no sequence of a pack sees
another."""

from functools import cache

import pytest
import torch
from logits_support import Packs, on_ranks, random_checkpoint, random_packs, seen_logits, tiny_config
from mtp_reference import Reference
from torch import Tensor

PACKED = ((9, 2, 17, 5), (3, 12), (14,))
ALONE = tuple((length,) for pack in PACKED for length in pack)
UNEVEN = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def training_logits(trainer, packs: Packs) -> list[Tensor]:
    """Logits of the main model and of the MTP layer, pack by pack, in a training step."""
    trainer.load()
    with seen_logits() as seen:
        trainer.train_step(packs)
    return seen


@cache
def reference() -> Reference:
    return Reference(random_checkpoint())


@pytest.mark.parametrize(
    ("lengths", "ranks", "perf"),
    [
        pytest.param(PACKED, 1, {}, id="packed"),
        pytest.param(ALONE, 1, {}, id="alone"),
        pytest.param(PACKED, 1, RECOMPUTE, id="recompute"),
        pytest.param(PACKED, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP2+SP"),
        pytest.param(PACKED, 2, {"expert_model_parallel_size": 2}, id="EP2"),
        pytest.param(PACKED, 2, UNEVEN, id="PP2-uneven"),
    ],
)
def test_mtp_logits_equal_the_published_equations(lengths: tuple[tuple[int, ...], ...], ranks: int, perf: dict) -> None:
    packs = random_packs(*lengths)
    config = tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf,
        mtp={"mtp_num_layers": 1, "enable_mtp_training": True},
    )
    seen_by = [seen for seen in on_ranks(training_logits, config, packs) if seen]
    assert seen_by
    for seen in seen_by:
        for pack, main, mtp in zip(packs, seen[::2], seen[1::2], strict=True):
            sequences = [torch.from_numpy(sample.tokens) for sample in pack]
            # A sequence's last row predicts nothing; nor does the MTP layer's, whose token after next is past the end.
            expected = torch.cat([reference().logits(tokens)[:-1] for tokens in sequences])
            torch.testing.assert_close(main.double(), expected, atol=2e-5, rtol=0)
            expected = torch.cat([reference().mtp_logits(tokens)[:-1] for tokens in sequences])
            torch.testing.assert_close(mtp.double(), expected, atol=2e-5, rtol=0)
