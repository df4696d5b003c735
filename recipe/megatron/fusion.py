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


def compiled_when_called(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compile(function)`, which imports the compiler, 1,800 modules, at once; this does at the first call. Where
    another function that calls it is compiled, it becomes a part of that one."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else compiled()(*args, **kwargs)

    return call


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, compiled where that lies on a GPU: what passes through memory once
    an operation elsewhere passes through it once in all. One compilation serves packs of every length, which is the
    first axis of every tensor; the other axes are compiled in, since a kernel spends most of its time on division by
    sizes that it does not know."""
    compiled = compiled_when_called(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda:
            return function(*args, **kwargs)
        for argument in args:
            if isinstance(argument, Tensor) and argument.dim():
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*args, **kwargs)

    return call
