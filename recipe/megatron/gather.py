"""Rows taken by an index, whose gradients are gathered too: no atomic additions, so the same sums in every run, in fp32
where a row was taken more than once.

Letters: T rows, G taken rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.megatron.device import to_training_device
from recipe.megatron.fusion import fused

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RowGather:
    """Which rows are taken, and the way back."""

    index: Tensor
    """[G] the row to take; where anything would do, some row."""
    place: Tensor
    """[T] where each row went first; -1 where it was not taken."""
    repeated: Tensor
    """Rows that were taken more than once."""
    places: Tensor
    """[repeated, W] all the places that each of these went to, then -1. W is a power of two: what is compiled for one
    width serves packs in which other numbers of samples share a prompt."""

    @classmethod
    def of(cls, index: IntArray, rows: int) -> "RowGather | None":
        """Takes `index` [G] of `rows` rows; -1 takes anything, which has no gradient. None if it takes them all in
        their order."""
        if len(index) == rows and (index == np.arange(rows)).all():
            return None
        taken = np.flatnonzero(index >= 0)
        taken = taken[np.argsort(index[taken], kind="stable")]
        counts = np.bincount(index[taken], minlength=rows)
        starts = np.cumsum(counts) - counts
        place = np.full(rows, -1)
        place[counts > 0] = taken[starts[counts > 0]]
        repeated = np.flatnonzero(counts > 1)
        column = np.arange(1 << int(counts.max(initial=1) - 1).bit_length())
        inside = column < counts[repeated, None]
        places = np.where(inside, taken[np.where(inside, starts[repeated, None] + column, 0)], -1)
        arrays = (np.maximum(index, 0), place, repeated, places)
        return cls(*map(to_training_device, arrays))

    def __call__(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [G, ...]."""
        taken = _Gather.apply(rows, self)
        assert isinstance(taken, Tensor)
        return taken


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return rows.index_select(0, gather.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather, flat = ctx.gather, grad.flatten(1)
        result = _present(flat, gather.place)
        if len(gather.repeated):
            result[gather.repeated] = _sum_of_present(flat, gather.places)
        return result.unflatten(1, grad.shape[1:]), None


@fused
def _present(rows: Tensor, place: Tensor) -> Tensor:
    """rows [G, D], place [T] -> [T, D], zeros where it is -1."""
    return torch.where(place[:, None] >= 0, rows[place.clamp(min=0)], 0)


@fused
def _sum_of_present(rows: Tensor, places: Tensor) -> Tensor:
    """rows [G, D], places [N, W] -> [N, D]: sums in fp32, without the places -1."""
    present = torch.where(places[..., None] >= 0, rows[places.clamp(min=0)], 0)
    return present.sum(1, dtype=torch.float32).to(rows.dtype)
