"""Weight gradients by matrix products straight into megatron's gradient buffers: no bf16 gradient beside them, no copy,
no rounding, and no clearing of the buffer before a step's first.

A parameter whose backward pass does so is marked by `write_directly`. Between `begin` and `finish` its `main_grad` is
blank (whatever the last step left) until a backward pass has written it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

_BLANK = "main_grad_is_blank"


def write_directly(parameter: Tensor) -> None:
    """Declares that the backward pass of `parameter`'s module goes through `WeightGradient`."""
    setattr(parameter, _BLANK, False)


def begin(replica: DistributedDataParallel) -> None:
    """Forgets the gradients of the step before."""
    others = []
    for parameter in replica.params_with_grad:
        parameter.grad_added_to_main_grad = False
        if hasattr(parameter, _BLANK):
            setattr(parameter, _BLANK, True)
        else:
            others.append(parameter.main_grad)
    torch._foreach_zero_(others)
    for group in replica.bucket_groups + replica.expert_parallel_bucket_groups:
        group.reset()


def finish(replicas: Iterable[DistributedDataParallel]) -> None:
    """Clears what no backward pass has written since `begin`."""
    for replica in replicas:
        for parameter in replica.params_with_grad:
            if getattr(parameter, _BLANK, False):
                parameter.main_grad.zero_()
                setattr(parameter, _BLANK, False)


@dataclass(frozen=True)
class WeightGradient:
    """Where one backward pass adds the gradient of a weight."""

    total: Tensor
    """The sum, in the weight's shape: megatron's `main_grad`, or for a weight outside its buffers an fp32 tensor."""
    is_blank: bool
    """Whether the first product overwrites."""
    is_own: bool

    @classmethod
    def of(cls, weight: Tensor) -> "WeightGradient":
        if not hasattr(weight, "main_grad"):
            return cls(torch.empty_like(weight, dtype=torch.float32), is_blank=True, is_own=True)
        blank = getattr(weight, _BLANK)
        setattr(weight, _BLANK, False)
        return cls(weight.main_grad, is_blank=blank, is_own=False)

    def for_autograd(self, dtype: torch.dtype) -> Tensor | None:
        """What the backward pass returns for the weight: nothing, if megatron has its gradient already."""
        return self.total.to(dtype) if self.is_own else None


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """total [m, n] += left [m, k] @ right [k, n], or = with `overwrite`. On a GPU an fp32 total takes the products of
    bf16 factors unrounded."""
    if left.shape[1] == 0:
        if overwrite:
            total.zero_()
    elif total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if overwrite else 1, out=total)
    elif total.is_cuda and overwrite:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(left, right)
        total.copy_(product) if overwrite else total.add_(product)
