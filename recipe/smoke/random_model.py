"""Random weights and random tokens for measurements."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from recipe.config import Architecture
from recipe.messages import TrainSample
from recipe.weight_sync.tensor import NamedTensor
from recipe.weights.table import placements

if TYPE_CHECKING:
    from recipe.megatron.rank import TrainerRank

DEVIATION = 0.02


@dataclass(frozen=True)
class Load:
    """What every rank gets for a step: packs of as many sequences of equal length, all prompts different, a fifth of
    each sequence its prompt."""

    tokens: int
    """Of a pack."""
    sequences: int
    """Of a pack."""
    packs: int
    vocabulary: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.tokens // self.sequences

    def pack(self, number: int) -> list[TrainSample]:
        """Random tokens, others for every number."""
        draw = np.random.default_rng(number)
        response = self.length - self.length // 5
        log_probs, weight = np.full(response, -12.0, dtype=np.float32), 1 / (self.packs * self.sequences * response)
        return [
            TrainSample(
                index=number * self.sequences + place,
                tokens=draw.integers(0, self.vocabulary, self.length),
                loss_mask=np.ones(response, dtype=np.bool_),
                weight=weight,
                mtp_weight=weight,
                advantages=draw.normal(size=response).astype(np.float32),
                rollout_log_probs=log_probs,
            )
            for place in range(self.sequences)
        ]

    def of_rank(self, rank: int) -> list[list[TrainSample]]:
        """This rank's packs."""
        return [self.pack(number) for number in range(rank * self.packs, (rank + 1) * self.packs)]


def fill_randomly(rank: "TrainerRank") -> None:
    """Gives a rank random weights, what ranks share the same on all of them, and its optimizer the state of the
    beginning."""
    from recipe.megatron.device import training_device
    from recipe.megatron.weights import named_weights

    generator = torch.Generator(training_device()).manual_seed(0)
    for name, weight in named_weights(rank.chunks).items():
        with torch.no_grad():
            if name.endswith("expert_bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, DEVIATION, generator=generator)
    rank.optimization.begin()


def random_weights(
    architecture: Architecture, *, with_mtp: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[NamedTensor]:
    """Every tensor of the model by its Hugging Face name, all of them pieces of the same random numbers: there is no
    more of them than the largest one."""
    table = placements(architecture, with_mtp=with_mtp).values()
    generator = torch.Generator(device).manual_seed(0)
    pools = {}
    for is_fp32 in {one.is_fp32 for one in table}:
        size = max(math.prod(one.hf_shape) for one in table if one.is_fp32 == is_fp32)
        pool = torch.empty(size, dtype=torch.float32 if is_fp32 else dtype, device=device)
        pools[is_fp32] = pool.normal_(0, DEVIATION, generator=generator)
    for placement in table:
        tensor = pools[placement.is_fp32][: math.prod(placement.hf_shape)].view(placement.hf_shape)
        yield from ((name, tensor) for name in placement.hf_names)
