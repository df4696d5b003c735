"""Full-vocabulary logits from the trainer's own passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from trainer_support import VOCABULARY, on_ranks, random_checkpoint, tiny_config

from recipe.messages import TrainSample

__all__ = ["Packs", "on_ranks", "random_checkpoint", "random_packs", "seen_logits", "tiny_config"]

Packs = list[list[TrainSample]]


def random_packs(*lengths: tuple[int, ...]) -> Packs:
    """Packs of sequences of these lengths in tokens, each with a prompt of one token, the same for all: every other
    token is then predicted, and all share a prompt as the samples of a group do."""
    draw = np.random.default_rng(5)
    return [[_sample(draw.integers(0, VOCABULARY, length), draw) for length in pack] for pack in lengths]


def _sample(tokens: np.ndarray, draw: np.random.Generator) -> TrainSample:
    tokens[0] = 7
    responses = len(tokens) - 1
    return TrainSample(
        index=int(draw.integers(1 << 40)),
        tokens=tokens,
        loss_mask=np.ones(responses, dtype=np.bool_),
        weight=0.01,
        advantages=draw.normal(size=responses).astype(np.float32),
    )


@contextmanager
def seen_logits() -> Iterator[list[Tensor]]:
    """Listens at the output head: the list fills with the logits [N, vocabulary] of the asked rows, call by call."""
    from recipe.megatron import model

    answer = model.chunked_log_probs
    seen: list[Tensor] = []

    def listen(hidden: Tensor, weight: Tensor, targets: Tensor, *, shard: Any, **options: Any) -> Any:
        own = (hidden @ weight.t()).detach()
        parts = [torch.empty_like(own) for _ in range(shard.group.size())]
        dist.all_gather(parts, own, group=shard.group)
        seen.append(torch.cat(parts, dim=1))
        return answer(hidden, weight, targets, shard=shard, **options)

    with mock.patch.object(model, "chunked_log_probs", listen):
        yield seen
