"""The norm, the routed experts and the multi-token-prediction layer that megatron's local layer spec is built with.

Letters: R rows (token, expert) pairs on this rank, E experts of this rank, H hidden size, F expert width of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from recipe.megatron.gradients import WeightGradient, add_product, write_directly
from recipe.megatron.swiglu import swiglu

LATENT_NORM_EPSILON = 1e-6
"""The epsilon of q_a_layernorm and kv_a_layernorm, which transformers fixes apart from rms_norm_eps."""


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm (arXiv:1910.07467); under sequence parallelism its gradient is summed over TP ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LatentRMSNorm(RMSNorm):
    """The norm of MLA's compressed queries and keys."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps=LATENT_NORM_EPSILON)


@dataclass(frozen=True)
class RowCounts:
    """How the rows [R] are spread over the experts."""

    per_expert: Tensor
    """[E]"""
    offsets: Tensor
    """[E] int32, on the rows' device: where each expert's rows end."""

    @classmethod
    def of(cls, per_expert: Tensor, device: torch.device) -> Self:
        return cls(per_expert, per_expert.cumsum(0, dtype=torch.int32).to(device))

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows."""
        return rows.split(self.per_expert.tolist())


def _grouped_product(rows: Tensor, weights: Tensor, spread: RowCounts) -> Tensor:
    """rows [R, in] sorted by expert, weights [E, in, out] -> [R, out]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=spread.offsets)
    output = rows.new_empty(len(rows), weights.shape[2])
    parts = zip(spread.split(rows), weights, spread.split(output), strict=True)
    for of_expert, weight, target in parts:
        torch.mm(of_expert, weight, out=target)
    return output


class _GroupedLinear(torch.autograd.Function):
    """`grouped_linear`, whose weights' gradient goes straight into megatron's buffer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, parameter: Tensor, spread: RowCounts) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.parameter, ctx.spread = parameter, spread
        return _grouped_product(rows, parameter.flatten(1, -2).transpose(1, 2), spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        parameter, spread = ctx.parameter, ctx.spread
        grad_rows = _grouped_product(grad, parameter.flatten(1, -2), spread)
        if not ctx.needs_input_grad[1]:
            return grad_rows, None, None
        gradient = WeightGradient.of(parameter)
        _add_grouped_products(gradient.total.flatten(1, -2), grad, rows, spread, overwrite=gradient.is_blank)
        return grad_rows, gradient.for_autograd(parameter.dtype), None


def _add_grouped_products(total: Tensor, grad: Tensor, rows: Tensor, spread: RowCounts, *, overwrite: bool) -> None:
    """total [E, out, in] += each expert's rows of grad [R, out], transposed, times its rows of rows [R, in]."""
    if total.is_cuda and total.dtype != grad.dtype:
        from recipe.megatron.grouped_gradient import add_grouped_products  # needs Triton, which is there with CUDA

        add_grouped_products(total, grad, rows, spread.offsets, overwrite=overwrite)
        return
    parts = zip(total, spread.split(grad), spread.split(rows), strict=True)
    for of_expert, grad_part, rows_part in parts:
        add_product(of_expert, grad_part.t(), rows_part, overwrite=overwrite)


def grouped_linear(rows: Tensor, parameter: Tensor, spread: RowCounts) -> Tensor:
    """Rows [R, in] sorted by expert, parameter [E, ..., in] whose middle axes are out -> [R, out]."""
    output = _GroupedLinear.apply(rows, parameter, spread)
    assert isinstance(output, Tensor)
    return output


class GroupedExperts(MegatronModule):
    """All SwiGLU experts of a rank in two tensors, run by torch's grouped matrix product.

    `linear_fc1` [E, 2, F, H] holds gate and up projections, `linear_fc2` [E, H, F] the down projection: every axis that
    a layout splits (experts over EP, width over expert-TP) is an axis of its own, so a checkpoint is a plain sharding.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size // self.tp_group.size(), config.hidden_size
        self.linear_fc1 = self._parameter((num_local_experts, 2, width, hidden), tensor_parallel_axis=2)
        self.linear_fc2 = self._parameter((num_local_experts, hidden, width), tensor_parallel_axis=2)

    def _parameter(self, shape: tuple[int, ...], tensor_parallel_axis: int) -> torch.nn.Parameter:
        device = torch.cuda.current_device()
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(parameter, True, tensor_parallel_axis, 1)
        # Expert gradients are summed over the expert data-parallel group, also when EP is 1 and TP ranks that see
        # different tokens hold copies of the same experts.
        parameter.allreduce = False  # type: ignore[attr-defined]
        write_directly(parameter)
        return parameter

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """rows [R, H] sorted by expert, tokens_per_expert [E], probs [R] -> [R, H], no bias."""
        spread = RowCounts.of(tokens_per_expert, rows.device)
        gate_up = grouped_linear(rows, self.linear_fc1, spread)
        return grouped_linear(swiglu(gate_up, probs), self.linear_fc2, spread), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The two tensors, split over EP along experts and over expert-TP along the width."""
        ensure_metadata_has_dp_cp_group(metadata)
        first = len(sharded_offsets)
        sharded: ShardedStateDict = {}
        for name, tensor in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            key = f"{prefix}{name}"
            sharded[key] = ShardedTensor.from_rank_offsets(
                key,
                tensor,
                *sharded_offsets,
                (first, self.ep_group.rank(), self.ep_group.size()),
                (first + 2, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=first,
            )
        return sharded


class MTPLayer(MultiTokenPredictionLayer):
    """megatron's multi-token-prediction layer, given token and position ids that are already those of the next token,
    and whose recomputation takes packed sequences."""

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Any,
        hidden_states: Tensor,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return input_ids, position_ids, embedding(input_ids=input_ids, position_ids=position_ids), hidden_states

    def _checkpointed_forward(
        self, forward_func: Callable[..., Tensor], *, hidden_states: Tensor, decoder_input: Tensor, **others: Any
    ) -> Tensor:
        def forward(hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
            return forward_func(hidden_states=hidden_states, decoder_input=decoder_input, **others)

        return tensor_parallel.checkpoint(
            forward, self.config.distribute_saved_activations, hidden_states, decoder_input
        )
