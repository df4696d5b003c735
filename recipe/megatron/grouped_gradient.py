"""The gradient of all experts' weights in one GPU kernel (Triton's, which comes with torch's CUDA wheels).

torch's grouped product returns bf16 alone, and a product an expert takes longer to launch than to compute. Here the
products of bf16 rows are summed in fp32 and go unrounded into megatron's gradient buffer.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}


@triton.jit
def _kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    offsets: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    OVERWRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile [BLOCK_M, BLOCK_N] of one expert's gradient [outputs, inputs]."""
    tile, expert = tl.program_id(0), tl.program_id(1)
    tiles_across = tl.cdiv(inputs, BLOCK_N)
    m = tile // tiles_across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tiles_across * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < outputs, n < inputs
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        in_k = (k < end)[:, None]
        row = k[:, None].to(tl.int64)
        left = tl.load(grad + row * outputs + m[None, :], mask=in_k & in_m[None, :], other=0.0)
        right = tl.load(rows + row * inputs + n[None, :], mask=in_k & in_n[None, :], other=0.0)
        product = tl.dot(tl.trans(left), right, product)
    target = total + expert.to(tl.int64) * outputs * inputs + m[:, None] * inputs + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if not OVERWRITE:
        product += tl.load(target, mask=inside, other=0.0)
    tl.store(target, product, mask=inside)


def add_grouped_products(total: Tensor, grad: Tensor, rows: Tensor, offsets: Tensor, *, overwrite: bool) -> None:
    """total [E, out, in] (fp32, contiguous) += for each expert its rows of grad [R, out], transposed, times those of
    rows [R, in]; = with `overwrite`. `offsets` [E] int32: where each expert's rows end."""
    experts, outputs, inputs = total.shape
    tiles = triton.cdiv(outputs, BLOCKS["BLOCK_M"]) * triton.cdiv(inputs, BLOCKS["BLOCK_N"])
    _kernel[(tiles, experts)](
        grad.contiguous(),
        rows.contiguous(),
        total,
        offsets,
        outputs,
        inputs,
        OVERWRITE=overwrite,
        **BLOCKS,
        num_warps=8,
        num_stages=3,
    )
