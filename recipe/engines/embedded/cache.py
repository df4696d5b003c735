"""The key/value cache: one latent entry a token (DeepSeek-V2, arXiv 2405.04434), in blocks of BLOCK positions."""

import torch
from torch import Tensor

BLOCK = 32
"""Positions that are attended to at once."""


class LatentCache:
    """Entries of D numbers for `rows` sequences; grows with the longest of them.

    `entries` is [layers, blocks, rows, BLOCK, D]: a block of neighbouring rows is one strided tensor, never a copy.
    """

    def __init__(self, layers: int, rows: int, entry_size: int) -> None:
        self.entries = torch.zeros(layers, 0, rows, BLOCK, entry_size)

    def reserve(self, positions: int) -> int:
        """Makes room for `positions` tokens a row; the blocks that hold them."""
        needed = -(-positions // BLOCK)
        layers, blocks, rows, _, size = self.entries.shape
        if needed > blocks:
            room = torch.zeros(layers, max(needed, 2 * blocks) - blocks, rows, BLOCK, size)
            self.entries = torch.cat([self.entries, room], dim=1)
        return needed

    def copy(self, sources: Tensor, targets: Tensor, positions: int) -> None:
        """Copies the first `positions` tokens (or a few more) of rows `sources` to rows `targets`."""
        used = self.entries[:, : -(-positions // BLOCK), :, :positions]
        used[:, :, targets] = used[:, :, sources]

    def free(self) -> None:
        """Gives the memory back; everything is forgotten."""
        self.entries = self.entries.new_zeros(self.entries.shape[0], 0, *self.entries.shape[2:])
