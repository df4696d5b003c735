"""Passes over a chunk's logits on a GPU (Triton's, which comes with torch's CUDA wheels): each logit is read once on
the way forward, and read and written once on the way back.

Letters: V vocabulary of this tensor-parallel rank, C tokens of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 16


@triton.jit
def _sums_kernel(
    logits: tl.tensor,
    column: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row of `sums` [4, C]: its largest value falls behind as larger ones are met ("online softmax")."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(column + row)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    exponential = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(logits + row * vocabulary + place, mask=place < vocabulary, other=float("-inf"))
        value = value.to(tl.float32) * scale
        new = tl.maximum(tl.maximum(largest, value), -1e30)
        fallen = tl.maximum(largest, -1e30) - new
        shifted = tl.where(value < -1e30, -1e30, value) - new  # a maximum would drop NaN
        kept, added = tl.exp(fallen), tl.exp(shifted)
        weighted = kept * (weighted + fallen * exponential) + added * shifted
        exponential = kept * exponential + added
        largest = new
    whole = tl.max(largest, 0)
    fallen = largest - whole
    kept = tl.exp(fallen)
    tl.store(sums + row, whole)
    tl.store(sums + tokens + row, tl.sum(kept * exponential))
    tl.store(sums + 2 * tokens + row, tl.sum(kept * (weighted + fallen * exponential)))
    here = (target >= 0) & (target < vocabulary)
    value = tl.load(logits + row * vocabulary + target, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(sums + 3 * tokens + row, tl.where(here, value - whole, 0.0))


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    log_sum: tl.tensor,
    column: tl.tensor,
    grad_log_prob: tl.tensor,
    entropy: tl.tensor,
    grad_entropy: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Part of a row, in place."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < vocabulary
    value = tl.load(logits + row * vocabulary + place, mask=inside, other=0.0).to(tl.float32)
    log_probability = value * scale - tl.load(log_sum + row)
    of_target = tl.load(grad_log_prob + row)
    spread = of_target + tl.load(grad_entropy + row) * (log_probability + tl.load(entropy + row))
    gradient = tl.where(place == tl.load(column + row), of_target, 0.0) - tl.exp(log_probability) * spread
    tl.store(logits + row * vocabulary + place, gradient * scale, mask=inside)


def row_sums(logits: Tensor, temperature: float, column: Tensor) -> Tensor:
    """Logits [C, V] and each row's target column [C] (outside [0, V): none) -> fp32 [4, C], as of `log_probs`."""
    tokens, vocabulary = logits.shape
    sums = logits.new_empty((4, tokens), dtype=torch.float32)
    if tokens:
        _sums_kernel[(tokens,)](logits, column, sums, tokens, vocabulary, 1 / temperature, BLOCK=BLOCK, num_warps=WARPS)
    return sums


def replace_by_gradient(
    logits: Tensor,
    temperature: float,
    log_sum: Tensor,
    column: Tensor,
    grad_log_prob: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
) -> None:
    """Contiguous logits [C, V], in place; the others [C] in fp32 and contiguous, as of `log_probs`."""
    tokens, vocabulary = logits.shape
    if tokens:
        _gradient_kernel[(tokens, triton.cdiv(vocabulary, BLOCK))](
            logits,
            log_sum,
            column,
            grad_log_prob,
            entropy,
            grad_entropy,
            vocabulary,
            1 / temperature,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
