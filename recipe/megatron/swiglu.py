"""SwiGLU (arXiv:2002.05202), the activation of experts and dense layers.

Letters: R rows, F width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor | None) -> Tensor:
        from recipe.megatron import swiglu_kernel  # needs Triton, which is there with CUDA

        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up, probs)
        return swiglu_kernel.forward(gate_up, probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        from recipe.megatron import swiglu_kernel

        return swiglu_kernel.backward(grad.contiguous(), *ctx.saved_tensors)


def swiglu(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    """[R, 2F] and, if given, a weight of each row [R] -> [R, F]; computed in fp32, with one rounding."""
    if gate_up.is_cuda:
        output = _OnGpu.apply(gate_up, None if probs is None else probs.contiguous())
        assert isinstance(output, Tensor)
        return output
    gate, up = gate_up.float().chunk(2, dim=-1)
    product = F.silu(gate) * up
    return (product if probs is None else product * probs.unsqueeze(-1)).to(gate_up.dtype)
