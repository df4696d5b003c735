"""`--moe-permute-fusion` without Transformer Engine: tokens are brought to their experts and back by gathers alone.

megatron's own permutation scatters with atomic additions, whose order, and so whose rounding, changes from run to run
on a GPU, and asks the GPU for the number of rows. Gathers do neither.

Letters: T tokens, K experts a token is sent to, E experts, R = T * K rows (token, expert) sorted by expert, H hidden
size.
"""

from typing import Any, NamedTuple

import megatron.core.transformer.moe.moe_utils as moe_utils
import torch
from torch import Tensor

from recipe.megatron.fusion import fused


class Permutation(NamedTuple):
    """Which row holds which token, both ways."""

    rows_of_token: Tensor
    """[T, K] the rows of each token, by expert."""
    token_of_row: Tensor
    """[R]"""


@fused
def _gather_sum(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, H], index [T, K] -> [T, H]: the sum of each token's rows, in fp32."""
    return rows[index].sum(1, dtype=torch.float32).to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows_of_token: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(rows_of_token)
        return tokens.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        return _gather_sum(grad, rows_of_token), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rows_of_token: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _gather_sum(rows, rows_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row), None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order: forward takes them by `index`, backward by its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(index)), None


def _inverse(index: Tensor) -> Tensor:
    return torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))


def permute(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Permutation]:
    """tokens [T, H], probs and routing_map [T, E] with K experts for every token, R -> rows [R, H] by expert, their
    probabilities [R], and what `unpermute` needs."""
    chosen_per_token = num_out_tokens // len(tokens)
    # Along the last axis: a sum down the columns takes the GPU a hundred times as long.
    ends = routing_map.t().contiguous().flatten().cumsum(0)
    experts = routing_map.byte().topk(chosen_per_token, dim=1).indices.sort(dim=1).values
    rows_of_token = ends.view(-1, len(tokens)).t().gather(1, experts) - 1
    slot_of_row = _inverse(rows_of_token.flatten())
    permutation = Permutation(rows_of_token, slot_of_row // chosen_per_token)
    row_probs = _Reorder.apply(probs.gather(1, experts).flatten(), slot_of_row)
    return _Permute.apply(tokens, *permutation), row_probs, permutation


def unpermute(rows: Tensor, permutation: Permutation, merging_probs: None = None, restore_shape: Any = None) -> Tensor:
    """rows [R, H] -> [T, H], each token's rows summed. The experts weighed them already."""
    assert merging_probs is None
    return _Unpermute.apply(rows, *permutation)


def sort_chunks(rows: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    """rows [R, H], cut into chunks of `sizes`, with the chunks in another order."""
    return _Reorder.apply(rows, _chunk_index(sizes, order, len(rows)))


def sort_chunks_with_probs(rows: Tensor, probs: Tensor, sizes: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """`sort_chunks` of rows [R, H] and of their probabilities [R]."""
    index = _chunk_index(sizes, order, len(rows))
    return _Reorder.apply(rows, index), _Reorder.apply(probs, index)


def _chunk_index(sizes: Tensor, order: Tensor, count: int) -> Tensor:
    """[R] where each row of the reordered chunks comes from."""
    starts = sizes.cumsum(0) - sizes
    sorted_sizes = sizes[order]
    shift = starts[order] - (sorted_sizes.cumsum(0) - sorted_sizes)
    return shift.repeat_interleave(sorted_sizes, output_size=count) + torch.arange(count, device=sizes.device)


def install() -> None:
    """Answers megatron's calls for Transformer Engine's kernels."""
    moe_utils.HAVE_TE = True
    moe_utils.fused_permute_with_probs = permute
    moe_utils.fused_unpermute = unpermute
    moe_utils.fused_sort_chunks_by_index = sort_chunks
    moe_utils.fused_sort_chunks_by_index_with_probs = sort_chunks_with_probs
