"""Chains of elementwise operations as one GPU kernel."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


ROW = 1024


def in_rows(flat: Tensor) -> Tensor:
    """[N] as [N / 1024, 1024] where it divides: a kernel that knows its last axis loads 16 bytes at a time."""
    return flat.view(-1, ROW) if flat.numel() % ROW == 0 else flat


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, compiled where that lies on a GPU: what passes through memory once
    an operation elsewhere passes through it once in all. One compilation serves packs of every length, which is the
    first axis of every tensor; the other axes are compiled in, since a kernel spends most of its time on division by
    sizes that it does not know. The compiler is imported when it is first needed, since that takes seconds."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda:
            return function(*args, **kwargs)
        for argument in args:
            if isinstance(argument, Tensor) and argument.dim():
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled()(*args, **kwargs)

    return call
