"""Rows that change ranks, forward and backward, in two halves: between them the GPU does other work."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """One exchange of rows [N, ...], of which each rank of `group` is sent its part, for those of the other ranks.

    `begin` sends, `finish` waits; the backward pass sends the gradients of what `finish` returns, and waits for them
    where `begin` was called. What is computed between the two, in either pass, overlaps with the exchange."""

    def __init__(self, group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> None:
        """`sent` and `received`: rows by rank."""
        self._group, self._sent, self._received = group, list(sent), list(received)
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """Rows to be sent -> where the others' will be: nothing but `finish` may look at it."""
        result = _Begin.apply(rows, self)
        assert isinstance(result, Tensor)
        return result

    def finish(self, rows: Tensor) -> Tensor:
        """What `begin` returned -> the others' rows."""
        result = _Finish.apply(rows, self)
        assert isinstance(result, Tensor)
        return result

    def send(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Starts the exchange, or with `back` that of the gradients. Returns where the others' rows will be."""
        assert self._under_way is None
        sent, received = (self._received, self._sent) if back else (self._sent, self._received)
        leaving, arriving = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, leaving, received, sent, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, leaving, arriving
        return arriving

    def wait(self) -> Tensor:
        """The others' rows: what follows, on the GPU, comes after the exchange."""
        assert self._under_way is not None
        work, _, arriving = self._under_way
        work.wait()
        self._under_way = None
        return arriving


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send(grad, back=True)
        return grad, None  # of the right shape; autograd waits for it before it calls `_Begin`
