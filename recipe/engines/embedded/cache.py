"""The key/value cache: one latent entry a token (DeepSeek-V2, arXiv 2405.04434), in blocks of BLOCK positions."""

import torch
from torch import Tensor

BLOCK = 32
"""Positions that are attended to at once."""


class LatentCache:
    """Entries of D numbers for `rows` sequences; grows with the longest of them.

    `entries` is [layers, blocks, rows, BLOCK, D]: a block of neighbouring rows is one strided tensor, never a copy.
    `experts` [layers, blocks, rows, BLOCK, K] are the K experts of each token, 0 in dense layers; K is 0 where nobody
    asks for them.
    """

    def __init__(self, layers: int, rows: int, entry_size: int, top_k: int = 0) -> None:
        self.entries = torch.zeros(layers, 0, rows, BLOCK, entry_size)
        self.experts = torch.zeros(layers, 0, rows, BLOCK, top_k, dtype=torch.int32)

    def reserve(self, positions: int) -> int:
        """Makes room for `positions` tokens a row; the blocks that hold them."""
        needed = -(-positions // BLOCK)
        blocks = self.entries.shape[1]
        if needed > blocks:
            self.entries, self.experts = (
                torch.cat([held, _blocks(held, max(needed, 2 * blocks) - blocks)], dim=1)
                for held in (self.entries, self.experts)
            )
        return needed

    def copy(self, sources: Tensor, targets: Tensor, positions: int) -> None:
        """Copies the first `positions` tokens (or a few more) of rows `sources` to rows `targets`."""
        for held in (self.entries, self.experts):
            used = held[:, : -(-positions // BLOCK), :, :positions]
            used[:, :, targets] = used[:, :, sources]

    def routed_experts(self, row: int, positions: int) -> Tensor:
        """[positions, layers, K] those of a row's first tokens."""
        return self.experts[:, :, row].flatten(1, 2)[:, :positions].transpose(0, 1)

    def free(self) -> None:
        """Gives the memory back; everything is forgotten."""
        self.entries, self.experts = _blocks(self.entries, 0), _blocks(self.experts, 0)


def _blocks(like: Tensor, count: int) -> Tensor:
    """So many empty blocks."""
    return like.new_zeros(like.shape[0], count, *like.shape[2:])
