"""What megatron asks of apex's CUDA extensions or does in many passes, done by torch in few.

Letters: T tokens of a pack on this rank, H hidden size, F width of a feed-forward layer on this rank.
"""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import mlp
from torch import Tensor

from recipe.megatron.gradients import WeightGradient, add_product, write_directly
from recipe.megatron.swiglu import swiglu


def add_weight_gradient(rows: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad [T, out] transposed @ rows [T, in]: apex's wgrad_gemm_accum_fp32 and _fp16."""
    add_product(main_grad, grad.t(), rows, overwrite=False)


def bias_swiglu(gate_up: Tensor, bias: None, *_: Any) -> Tensor:
    """[T, 1, 2F] -> [T, 1, F]: megatron's bias_swiglu_impl, without a bias."""
    assert bias is None
    return swiglu(gate_up.flatten(0, 1)).unflatten(0, gate_up.shape[:2])


class _Embed(torch.autograd.Function):
    """`TokenEmbedding`'s rows, whose gradient goes straight into megatron's buffer: autograd's is as large as the
    vocabulary, for a few thousand rows."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first_id: int, is_shard: bool) -> Tensor:
        row, missing, ctx.weight = ids.flatten() - first_id, None, weight
        if is_shard:
            missing = (row < 0) | (row >= len(weight))
            row.masked_fill_(missing, 0)
        ctx.save_for_backward(row, missing)
        embedded = weight.index_select(0, row)
        if missing is not None:
            embedded.masked_fill_(missing[:, None], 0)
        return embedded.unflatten(0, ids.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        row, missing = ctx.saved_tensors
        gradient = WeightGradient.of(ctx.weight)
        if gradient.is_blank:
            gradient.total.zero_()
        rows = grad.flatten(0, -2).to(gradient.total.dtype)
        if missing is not None:
            rows = rows.masked_fill(missing[:, None], 0)
        if rows.is_cuda:
            gradient.total.index_put_((row,), rows, accumulate=True)  # sorts, where index_add_ adds in any order
        else:
            gradient.total.index_add_(0, row, rows)
        return None, gradient.for_autograd(grad.dtype), None, None


class TokenEmbedding(tensor_parallel.VocabParallelEmbedding):
    """megatron's embedding, its vocabulary spread over the tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        write_directly(self.weight)

    def forward(self, input_: Tensor) -> Tensor:
        """Ids [1, T] -> [1, T, H], or with sequence parallelism this rank's [T / TP, 1, H]."""
        embedded = _Embed.apply(input_, self.weight, self.vocab_start_index, self.tp_group.size() > 1)
        assert isinstance(embedded, Tensor)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(
                embedded.transpose(0, 1).contiguous(), group=self.tp_group
            )
        return reduce_from_tensor_model_parallel_region(embedded, group=self.tp_group)


def install() -> None:
    """Puts these into megatron's places, for models that are built hereafter."""
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    mlp.bias_swiglu_impl = bias_swiglu
    tensor_parallel.VocabParallelEmbedding = TokenEmbedding
