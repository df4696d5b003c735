"""Multi-latent attention over packed sequences with torch's own kernels (no Transformer Engine, no flash-attn build).

Letters: T tokens of a pack on this rank, S segments, L longest segment, N heads of this rank, D query/key head size,
V value head size, R size of the rotary part.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

from recipe.megatron.fusion import fused


@dataclass
class PackedSequences(PackedSeqParams):
    """A pack of sequences, cut into segments of queries that each attend to a run of keys.

    A segment is a whole sequence, which attends to itself; or a response, which attends to its prompt's keys and its
    own; or, with context parallelism, one of the rank's two chunks of a sequence, which attends to the sequence's
    beginning up to the chunk's end. `key_index` takes the keys from the pack's (all-gathered) rows. The causal mask is
    aligned at the segment's end.
    """

    position_ids: Tensor | None = None
    """[T] position of each token in its own sequence."""
    longest_sequence: int = 0
    """Tokens of the longest whole sequence: a bound on position_ids."""
    query_lengths: tuple[int, ...] = ()
    """Tokens of each segment, in the order of the pack."""
    key_lengths: tuple[int, ...] = ()
    """Keys of each segment."""
    key_index: Tensor | None = None
    """[sum(key_lengths)] rows of the (all-gathered) keys; None where a segment's keys are itself."""

    @cached_property
    def grids(self) -> "SegmentGrids":
        """The segments in a padded grid."""
        assert self.position_ids is not None
        return SegmentGrids(self.query_lengths, self.key_lengths, self.position_ids.device)


class SegmentGrids:
    """A pack's queries and keys in padded grids, and who sees whom: what torch's dense attention kernel takes."""

    def __init__(self, query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device) -> None:
        self.queries = self.keys = SegmentGrid(query_lengths, device)
        self.mask: Tensor | None = None
        """[S, 1, L_q, L_k]; None where the plain causal mask serves."""
        if key_lengths != query_lengths:
            self.keys = SegmentGrid(key_lengths, device)
            self.mask = bottom_right_mask(query_lengths, key_lengths).to(device)


class SegmentGrid:
    """Where packed rows lie in a padded [S, L] grid."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.shape = (len(lengths), max(lengths))
        length = torch.tensor(lengths, device=device)
        column = torch.arange(self.shape[1], device=device)
        start = length.cumsum(0) - length
        inside = column < length[:, None]
        self.source = torch.where(inside, start[:, None] + column, 0).flatten()
        self.place = inside.flatten().nonzero().squeeze(1)
        self.is_full = bool(inside.all())

    def pad(self, rows: Tensor) -> Tensor:
        """[T, N, D] -> [S, N, L, D]; what lies past a segment's end is some other row, to be masked or ignored."""
        grid = rows if self.is_full else rows.index_select(0, self.source)
        return grid.view(*self.shape, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, grid: Tensor) -> Tensor:
        """[S, N, L, V] -> [T, N, V]."""
        rows = grid.transpose(1, 2).flatten(0, 1)
        return rows if self.is_full else rows.index_select(0, self.place)


class PackedAttention(MegatronModule):
    """The core attention of megatron's MLA: causal, packed, with keys and values gathered over context parallel ranks.

    `--attention-backend` flash: torch's variable-length flash kernel (on the CPU, which has none, as fused). fused: the
    segments in a padded grid for `scaled_dot_product_attention`, on CUDA by cuDNN. unfused: matrix products and a
    softmax in fp32, which holds all scores. auto: flash, or unfused on a GPU in fp32, which the others cannot.
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
        if pack.key_index is not None:
            key = self._gather(key).index_select(0, pack.key_index)
            value = self._gather(value).index_select(0, pack.key_index)
        # The kernels want one head size for queries, keys and values.
        padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
        attend = self._unfused if self.backend is AttnBackend.unfused else self._fused
        if query.is_cuda and self.backend in (AttnBackend.auto, AttnBackend.flash):
            attend = self._unfused if query.dtype == torch.float32 else self._flash
        return attend(query, key, padded, pack)[..., : value.shape[-1]].flatten(1)

    def _gather(self, rows: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(rows.contiguous(), group=self.context_parallel_group)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            query,
            key,
            value,
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
        kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if query.is_cuda else nullcontext()
        with kernel:
            output = F.scaled_dot_product_attention(
                grids.queries.pad(query),
                grids.keys.pad(key),
                grids.keys.pad(value),
                attn_mask=grids.mask,
                is_causal=grids.mask is None,
                scale=self.softmax_scale,
            )
        return grids.queries.unpad(output)

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        assert self.softmax_scale is not None
        outputs = []
        segments = zip(
            query.split(pack.query_lengths), key.split(pack.key_lengths), value.split(pack.key_lengths), strict=True
        )
        for queries, keys, values in segments:
            scores = torch.einsum("qnd,knd->nqk", queries.float(), keys.float()) * self.softmax_scale
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril(len(keys) - len(queries))
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(values.dtype)
            outputs.append(torch.einsum("nqk,knd->qnd", weights, values))
        return torch.cat(outputs)


def bottom_right_mask(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> Tensor:
    """[S, 1, L_q, L_k] True where a query may see a key: the last query of a segment sees all its keys."""
    query = torch.arange(max(query_lengths))[None, :, None]
    key = torch.arange(max(key_lengths))[None, None, :]
    shift = torch.tensor(key_lengths) - torch.tensor(query_lengths)
    return (key <= query + shift[:, None, None])[:, None]


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
