"""From samples to a pack on this rank. The one place that knows how context parallelism lays tokens out.

A pack is all its samples end to end, each padded to a multiple of 2 * CP, and one sequence of padding at its end where
tensor parallelism needs the token count to divide. With context parallelism a sequence is cut into 2 * CP chunks and
rank r holds chunks r and 2 * CP - 1 - r ("zigzag": equal work under a causal mask).

Letters: G tokens of the whole pack, T tokens of this rank, N tokens asked for (the response tokens predicted here).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.megatron.attention import PackedSequences, SegmentGrid
from recipe.megatron.device import training_device
from recipe.megatron.model import ModelInput, NextTokens
from recipe.messages import FloatArray, TrainSample

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenLayout:
    """How packs are split: context-parallel rank and size, and what a rank's token count must divide by."""

    context_rank: int = 0
    context_size: int = 1
    token_multiple: int = 1


@dataclass(frozen=True)
class MicroBatch:
    """A pack on this rank and what the loss needs, aligned with the N asked tokens."""

    inputs: ModelInput
    weights: Tensor
    mtp_weights: Tensor
    advantages: Tensor | None
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    sample_of: IntArray
    """[N] which sample of the pack an asked token belongs to."""
    offset_of: IntArray
    """[N] its place in that sample's response."""


@dataclass(frozen=True)
class _Sequences:
    """The padded sequences of a pack."""

    lengths: IntArray
    """Without padding; the last one may be padding altogether."""
    padded: IntArray
    starts: IntArray

    @property
    def total(self) -> int:
        return int(self.padded.sum())

    @classmethod
    def of(cls, samples: Sequence[TrainSample], layout: TokenLayout) -> "_Sequences":
        unit = 2 * layout.context_size if layout.context_size > 1 else 1
        lengths = np.array([sample.length for sample in samples], dtype=np.int64)
        padded = -(-lengths // unit) * unit
        pack_unit = math.lcm(unit, layout.context_size * layout.token_multiple)
        if missing := -int(padded.sum()) % pack_unit:
            lengths, padded = np.append(lengths, missing), np.append(padded, missing)
        return cls(lengths, padded, np.cumsum(padded) - padded)


def _zigzag(sequences: _Sequences, rank: int, size: int) -> IntArray:
    """[T] positions in the pack that context-parallel rank `rank` holds, in its order."""
    if size == 1:
        return np.arange(sequences.total)
    pieces = []
    for start, length in zip(sequences.starts.tolist(), sequences.padded.tolist(), strict=True):
        chunk = length // (2 * size)
        pieces += [start + np.arange(chunk) + part * chunk for part in (rank, 2 * size - 1 - rank)]
    return np.concatenate(pieces)


def _attention_segments(sequences: _Sequences, positions: IntArray, layout: TokenLayout) -> PackedSequences:
    device = training_device()
    size = layout.context_size
    longest = int(sequences.padded.max())
    if size == 1:
        query_lengths = key_lengths = tuple(sequences.padded.tolist())
        key_index = None
    else:
        chunks = [(r, int(length) // (2 * size)) for length in sequences.padded for r in _chunks_of(layout)]
        query_lengths = tuple(chunk for _, chunk in chunks)
        key_lengths = tuple((number + 1) * chunk for number, chunk in chunks)
        key_index = torch.from_numpy(_gathered_keys(sequences, key_lengths, layout)).to(device)
    queries = None if device.type == "cuda" else SegmentGrid(query_lengths)
    keys = queries if key_index is None else (None if device.type == "cuda" else SegmentGrid(key_lengths))
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=_cumulative(query_lengths, device),
        cu_seqlens_kv=_cumulative(key_lengths, device),
        max_seqlen_q=max(query_lengths),
        max_seqlen_kv=max(key_lengths),
        position_ids=torch.from_numpy(positions).to(device),
        longest_sequence=longest,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        key_index=key_index,
        query_grid=queries,
        key_grid=keys,
    )


def _chunks_of(layout: TokenLayout) -> tuple[int, int]:
    return layout.context_rank, 2 * layout.context_size - 1 - layout.context_rank


def _gathered_keys(sequences: _Sequences, key_lengths: tuple[int, ...], layout: TokenLayout) -> IntArray:
    """Rows of the keys gathered rank after rank that each of this rank's segments attends to."""
    held = [_zigzag(sequences, rank, layout.context_size) for rank in range(layout.context_size)]
    row_of = np.empty(sequences.total, dtype=np.int64)
    row_of[np.concatenate(held)] = np.arange(sequences.total)
    starts = np.repeat(sequences.starts, 2).tolist()
    return np.concatenate([row_of[start : start + keys] for start, keys in zip(starts, key_lengths, strict=True)])


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Ask:
    """The asked tokens on this rank: rows that predict, and the choice among all response tokens of the pack."""

    rows: IntArray
    chosen: NDArray[np.bool_] | slice


def _ask(predicting: IntArray, row_of: IntArray | None) -> _Ask:
    if row_of is None:
        return _Ask(predicting, slice(None))
    rows = row_of[predicting]
    return _Ask(rows[rows >= 0], rows >= 0)


def build_microbatch(samples: Sequence[TrainSample], layout: TokenLayout) -> MicroBatch:
    """The pack of `samples` on this rank."""
    sequences = _Sequences.of(samples, layout)
    held = _zigzag(sequences, layout.context_rank, layout.context_size)
    tokens = np.zeros(sequences.total + 2, dtype=np.int64)
    for start, sample in zip(sequences.starts.tolist(), samples, strict=False):
        tokens[start : start + sample.length] = sample.tokens
    positions = np.arange(sequences.total) - np.repeat(sequences.starts, sequences.padded)

    row_of = None
    if layout.context_size > 1:
        row_of = np.full(sequences.total, -1, dtype=np.int64)
        row_of[held] = np.arange(len(held))
    responses = np.array([sample.response_length for sample in samples], dtype=np.int64)
    ends = sequences.starts[: len(samples)] + sequences.lengths[: len(samples)]
    sample_of = np.repeat(np.arange(len(samples)), responses)
    offset_of = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
    predicting = np.repeat(ends - responses, responses) + offset_of - 1
    weights = np.concatenate([sample.loss_mask.astype(np.float32) * np.float32(sample.weight) for sample in samples])

    # The MTP layer predicts a token from the hidden state two places before it and the token between.
    mask = weights > 0
    follows = (offset_of > 0) & mask & np.concatenate([[False], mask[:-1]])
    ask = _ask(predicting, row_of)
    mtp_ask = _ask(predicting[follows] - 1, row_of)

    device = training_device()

    def to_device(array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def aligned(arrays: list[FloatArray | None]) -> Tensor | None:
        present = [array for array in arrays if array is not None]
        return to_device(np.concatenate(present)[ask.chosen]) if present else None

    inputs = ModelInput(
        input_ids=to_device(tokens[held][None]),
        position_ids=to_device(positions[held][None]),
        sequences=_attention_segments(sequences, positions[held], layout),
        ask=NextTokens(to_device(ask.rows), to_device(tokens[predicting + 1][ask.chosen])),
        mtp_input_ids=to_device(tokens[held + 1][None]),
        mtp_ask=NextTokens(to_device(mtp_ask.rows), to_device(tokens[predicting[follows] + 1][mtp_ask.chosen])),
    )
    return MicroBatch(
        inputs=inputs,
        weights=to_device(weights[ask.chosen]),
        mtp_weights=to_device(weights[follows][mtp_ask.chosen]),
        advantages=aligned([sample.advantages for sample in samples]),
        old_log_probs=aligned([sample.old_log_probs for sample in samples]),
        ref_log_probs=aligned([sample.ref_log_probs for sample in samples]),
        rollout_log_probs=aligned([sample.rollout_log_probs for sample in samples]),
        sample_of=sample_of[ask.chosen],
        offset_of=offset_of[ask.chosen],
    )
