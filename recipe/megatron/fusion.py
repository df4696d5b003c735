"""Chains of elementwise operations as one GPU kernel."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, compiled where that lies on a GPU: what passes through memory once
    an operation elsewhere passes through it once in all. One compilation serves packs of every length."""
    compiled = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        return compiled(*args, **kwargs) if first.is_cuda else function(*args, **kwargs)

    return call
