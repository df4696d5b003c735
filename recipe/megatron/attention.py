"""Multi-latent attention over packed sequences with torch's own kernels (no Transformer Engine, no flash-attn build).

Letters: T tokens of a pack on this rank, S segments, L longest segment, N heads of this rank, D query/key head size,
V value head size, R size of the rotary part.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipe.megatron.device import training_device
from recipe.megatron.fusion import fused
from recipe.megatron.gather import IntArray, RowGather
from recipe.megatron.grids import SegmentGrids, grids_are_faster


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a pack are to be taken, of T rows that a router of this rank sees."""

    experts: Tensor
    """[layers with experts in this pipeline chunk, T, K] uint8, or NOT_ROUTED."""
    in_response: Tensor
    """[T] bool: not of a prompt, of which a pack may have one for several samples, nor padding."""


@dataclass
class PackedSequences(PackedSeqParams):
    """A pack of sequences, cut into segments of queries that each attend to a run of keys.

    A segment is a whole sequence, which attends to itself; or a response, which attends to its prompt's keys and its
    own; or, with context parallelism, one of the rank's two chunks of a sequence, which attends to the sequence's
    beginning up to the chunk's end. The causal mask is aligned at the segment's end.
    """

    position_ids: Tensor | None = None
    """[T] position of each token in its own sequence."""
    longest_sequence: int = 0
    """Tokens of the longest whole sequence: a bound on position_ids."""
    query_lengths: tuple[int, ...] = ()
    """Tokens of each segment, in the order of the pack."""
    key_lengths: tuple[int, ...] = ()
    """Keys of each segment."""
    key_rows: IntArray | None = None
    """[sum(key_lengths)] rows of the (all-gathered) keys; None where a segment's keys are itself."""
    gathered_rows: int = 0
    """Keys there are, on all context-parallel ranks."""
    routing: "Routing | None" = None
    """Where tokens are to be taken; None: the routers choose."""

    @cached_property
    def keys(self) -> RowGather | None:
        """Takes the segments' keys, one segment after the other; None where a segment's keys are itself."""
        if self.key_rows is None:
            return None
        return RowGather.of(self.key_rows, self.gathered_rows)

    @cached_property
    def grids(self) -> SegmentGrids:
        """The segments in padded grids."""
        key_rows = np.arange(self.gathered_rows) if self.key_rows is None else self.key_rows
        on_gpu = training_device().type == "cuda"
        lengths = self.query_lengths, self.key_lengths
        return SegmentGrids(*lengths, key_rows, self.gathered_rows, few_shapes=on_gpu)


class PackedAttention(MegatronModule):
    """The core attention of megatron's MLA: causal, packed, with keys and values gathered over context parallel ranks.

    `--attention-backend` flash: torch's variable-length flash kernel. fused: the segments in padded grids for
    `scaled_dot_product_attention`, on CUDA by cuDNN. unfused: matrix products and a softmax in fp32, which holds all
    scores. auto on a GPU: fused where segments are long and of few lengths, or else flash; unfused in fp32, which these
    cannot. On the CPU, where there is no flash kernel, flash and auto are fused.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        attention_dropout: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.softmax_scale = softmax_scale
        self.context_parallel_group = pg_collection.cp
        self.backend = config.attention_backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        attn_mask_type: Any = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, N, D], key [T, N, D], value [T, N, V] -> [T, N * V]."""
        assert packed_seq_params is not None
        pack = packed_seq_params
        if self.context_parallel_group.size() > 1:
            key, value = self._gather(key), self._gather(value)
        # The kernels want one head size for queries, keys and values.
        if missing := query.shape[-1] - value.shape[-1]:
            padded = F.pad(value, (0, missing))
            return self._kernel(query, pack)(query, key, padded, pack)[..., : value.shape[-1]].flatten(1)
        return self._kernel(query, pack)(query, key, value, pack).flatten(1)

    def _kernel(
        self, query: Tensor, pack: PackedSequences
    ) -> Callable[[Tensor, Tensor, Tensor, PackedSequences], Tensor]:
        backend = self.backend
        if backend is AttnBackend.auto and query.is_cuda:
            suits_grids = (
                AttnBackend.fused if grids_are_faster(pack.query_lengths, pack.key_lengths) else AttnBackend.flash
            )
            backend = suits_grids if query.dtype == torch.bfloat16 else AttnBackend.unfused
        if backend is AttnBackend.unfused:
            return self._unfused
        return self._flash if backend is AttnBackend.flash and query.is_cuda else self._fused

    def _gather(self, rows: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(rows.contiguous(), group=self.context_parallel_group)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            query,
            _taken(pack.keys, key),
            _taken(pack.keys, value),
            pack.cu_seqlens_q,
            pack.cu_seqlens_kv,
            pack.max_seqlen_q,
            pack.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
        )
        assert isinstance(output, Tensor)
        return output

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        grids = pack.grids
        rows = [_taken(grids.query, query), _taken(grids.key, key), _taken(grids.key, value)]
        outputs = []
        kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if query.is_cuda else nullcontext()
        with kernel:
            # A split into one would cost a copy of its gradient.
            pieces = [one.split(grids.sizes) if len(grids.sizes) > 1 else (one,) for one in rows]
            for shape, *parts in zip(grids.shapes, *pieces, strict=True):
                q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
                output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
                outputs.append(output.transpose(1, 2).flatten(0, 1))
        return _taken(grids.output, torch.cat(outputs) if len(outputs) > 1 else outputs[0])

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        assert self.softmax_scale is not None
        outputs = []
        key, value = _taken(pack.keys, key), _taken(pack.keys, value)
        segments = zip(
            query.split(pack.query_lengths), key.split(pack.key_lengths), value.split(pack.key_lengths), strict=True
        )
        for queries, keys, values in segments:
            scores = torch.einsum("qnd,knd->nqk", queries.float(), keys.float()) * self.softmax_scale
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril(len(keys) - len(queries))
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(values.dtype)
            outputs.append(torch.einsum("nqk,knd->qnd", weights, values))
        return torch.cat(outputs)


def _taken(gather: RowGather | None, rows: Tensor) -> Tensor:
    return rows if gather is None else gather(rows)


class RotaryTable:
    """Cosines and sines of every position for the decoupled rotary part of MLA (DeepSeek-V2, arXiv:2405.04434)."""

    def __init__(self, size: int, base: float) -> None:
        self.inverse_frequency = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        self._cached = torch.empty(0)

    def __call__(self, position_ids: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Positions [T], all below `longest` -> cosine and sine [T, 1, R / 2] in fp32."""
        if self._cached.shape[0] < longest or self._cached.device != position_ids.device:
            positions = torch.arange(2 ** math.ceil(math.log2(longest)), dtype=torch.float32)
            angles = torch.outer(positions, self.inverse_frequency)
            self._cached = torch.stack([angles.cos(), angles.sin()], dim=1).to(position_ids.device)
        cosine, sine = self._cached[position_ids].unbind(1)
        return cosine[:, None], sine[:, None]


def rotate(interleaved: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates pairs of neighbours [T, N, R] and leaves them split in halves, as both queries and keys are used."""
    even, odd = interleaved.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).to(interleaved.dtype)


@fused
def rotated(
    query: Tensor, key_value: Tensor, k_rotary: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """query [T, N, D] whose last R are rotary, key content and value [T, N, D - R + V], rotary keys shared by all heads
    [T, R] -> query, key [T, N, D], value [T, N, V]."""
    content = query.shape[-1] - k_rotary.shape[-1]
    q_rotary = rotate(query[..., content:], cosine, sine)
    k_rotary = rotate(k_rotary.unsqueeze(1), cosine, sine).expand(-1, query.shape[1], -1)
    query = torch.cat([query[..., :content], q_rotary], dim=-1)
    key = torch.cat([key_value[..., :content], k_rotary], dim=-1)
    return query, key, key_value[..., content:].contiguous()


class LatentAttention(MLASelfAttention):
    """megatron's MLA whose rotary embedding follows the pack's position ids: one gather instead of a loop over
    sequences, and right under any layout of the tokens over ranks."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rotary_table = RotaryTable(config.qk_pos_emb_head_dim, config.rotary_base)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSequences | None = None,
        inference_context: None = None,
        *,
        inference_params: None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden_states [T (/ TP with sequence parallelism), 1, H] -> query, key [T, N, D], value [T, N, V] and the
        two compressed latents."""
        assert packed_seq_params is not None
        assert packed_seq_params.position_ids is not None
        config = self.config
        heads = self.num_attention_heads_per_partition
        q_compressed = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0].squeeze(1))
        kv_combined = self.linear_kv_down_proj(hidden_states)[0].squeeze(1)
        kv_compressed, k_rotary = kv_combined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        kv_compressed = self.kv_layernorm(kv_compressed)
        if config.sequence_parallel:
            k_rotary = gather_from_sequence_parallel_region(k_rotary, group=self.tp_group)

        query = self.linear_q_up_proj(q_compressed)[0].unflatten(-1, (heads, self.q_head_dim))
        key_value = self.linear_kv_up_proj(kv_compressed)[0]
        key_value = key_value.unflatten(-1, (heads, config.qk_head_dim + config.v_head_dim))
        cosine, sine = self.rotary_table(packed_seq_params.position_ids, packed_seq_params.longest_sequence)
        query, key, value = rotated(query, key_value, k_rotary, cosine, sine)
        return query, key, value, q_compressed, kv_compressed
