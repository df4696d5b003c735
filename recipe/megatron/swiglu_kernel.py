"""SwiGLU on a GPU, one pass each way (Triton's, which comes with torch's CUDA wheels).

Letters: R rows, F width. Compiled from torch's operations the backward pass takes up to five times as long: it joins
the two halves of the gradient element by element.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
WARPS = 2


@triton.jit
def _forward_kernel(
    gate_up: tl.tensor,
    probs: tl.tensor,
    output: tl.tensor,
    width: tl.tensor,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of the output [R, F]."""
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32) if WEIGHTED else 1.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row * width + column, gate * tl.sigmoid(gate) * up * prob, mask=inside)


@triton.jit
def _backward_kernel(
    grad: tl.tensor,
    gate_up: tl.tensor,
    probs: tl.tensor,
    grad_gate_up: tl.tensor,
    grad_probs: tl.tensor,
    width: tl.tensor,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row of the gradients [R, 2F] and [R]."""
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32) if WEIGHTED else 1.0
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        place = row * 2 * width + column
        gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + width, mask=inside, other=0.0).to(tl.float32)
        flow = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(grad_gate_up + place, flow * prob * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
        tl.store(grad_gate_up + place + width, flow * prob * silu, mask=inside)
        products += flow * silu * up
    if WEIGHTED:
        tl.store(grad_probs + row, tl.sum(products))


def forward(gate_up: Tensor, probs: Tensor | None) -> Tensor:
    """Contiguous [R, 2F] and [R] -> [R, F]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, width)
    if rows:
        _forward_kernel[(rows,)](
            gate_up, probs, output, width, WEIGHTED=probs is not None, BLOCK=BLOCK, num_warps=WARPS
        )
    return output


def backward(grad: Tensor, gate_up: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous gradient [R, F] of what `forward` made of the others -> their gradients."""
    rows, width = grad.shape
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    grad_probs = None if probs is None else probs.new_empty(probs.shape)
    if rows:
        _backward_kernel[(rows,)](
            grad,
            gate_up,
            probs,
            grad_gate_up,
            grad_probs,
            width,
            WEIGHTED=probs is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad_gate_up, grad_probs
