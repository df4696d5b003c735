"""From samples to a pack on this rank. The one place that knows how tokens are laid out.

Without context parallelism samples of one prompt share it: a pack holds each prompt once, then the responses to it,
and a response's queries see the prompt's keys and its own. Gradients are those of the separate sequences, for fewer
tokens. A response's last token predicts nothing and is left out.

With context parallelism a pack is whole sequences end to end. A sequence is padded to 2 * CP chunks, of which rank r
holds chunks r and 2 * CP - 1 - r ("zigzag": equal work under a causal mask). The MTP layer, which joins a prompt's last
token with its different successors, always reads whole sequences: where prompts are shared it gathers them.

Letters: T tokens of a pack on this rank, S segments of queries, N asked tokens (the response tokens predicted here).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recipe.megatron.attention import PackedSequences, Routing
from recipe.megatron.device import to_training_device
from recipe.megatron.model import ModelInput, MtpInput, NextTokens
from recipe.messages import NOT_ROUTED, FloatArray, TrainSample

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TokenLayout:
    """How packs are laid out: context-parallel rank and size, what a rank's token count must divide by, and whether
    the MTP layer needs its input."""

    context_rank: int = 0
    context_size: int = 1
    token_multiple: int = 1
    with_mtp: bool = False
    tensor_rank: int = 0
    """Of the `token_multiple` ranks that have a part of the tokens each, where a router sees them."""
    moe_layers: tuple[int, ...] = ()
    """Layers whose routers are told what the samples say, by their number among all that have experts."""


@dataclass(frozen=True)
class MicroBatch:
    """A pack on this rank and what the loss needs, aligned with the N asked tokens."""

    inputs: ModelInput
    weights: Tensor
    mtp_weights: Tensor | None
    """Aligned with what is asked of the MTP layer; None where it is not trained."""
    advantages: Tensor | None
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    sources: Tensor | None
    response_lengths: IntArray
    """R of each sample of the pack."""
    trained_lengths: IntArray
    """Trained tokens of each sample of the pack, on all context-parallel ranks."""
    sample_of: IntArray
    """[N] which sample of the pack an asked token belongs to."""
    offset_of: IntArray
    """[N] its place in that sample's response."""
    rows: IntArray
    """[sum of sample lengths] row of every token on this rank, one sample after the other; -1 where another rank holds
    it, or none does: a last token may be nowhere."""


@dataclass(frozen=True)
class _Pack:
    """The tokens of a pack on this rank and who attends to whom."""

    ids: IntArray
    """[T]"""
    next_ids: IntArray | None
    """[T] each token's successor in its sequence, anything where there is none; None where prompts are shared and a
    token may have several."""
    positions: IntArray
    """[T] in its own sequence."""
    query_lengths: tuple[int, ...]
    """[S]"""
    key_lengths: tuple[int, ...]
    """[S]"""
    key_rows: IntArray | None
    """[sum(key_lengths)] rows of the keys (gathered over context-parallel ranks) that each segment sees; None where a
    segment's keys are itself."""
    predicting: IntArray
    """Row of the token that predicts each response token of the samples, one sample after the other; -1 where another
    rank holds it."""
    gathered_rows: int
    """T, of all context-parallel ranks together."""
    rows: IntArray
    """[sum of sample lengths] see `MicroBatch`; a shared prompt's are those of each of its samples."""
    shares_prompts: bool


def _share_prompts(samples: Sequence[TrainSample], layout: TokenLayout) -> _Pack:
    groups: dict[bytes, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.prompt.tobytes(), []).append(number)
    ids: list[IntArray] = []
    positions: list[IntArray] = []
    keys: list[IntArray] = []
    predicting: list[IntArray] = [np.empty(0, dtype=np.int64)] * len(samples)
    sequences = list(predicting)
    end = 0

    def add(tokens: IntArray, position: int, seen: IntArray) -> IntArray:
        nonlocal end
        rows = np.arange(end, end + len(tokens))
        end += len(tokens)
        ids.append(tokens)
        positions.append(np.arange(position, position + len(tokens)))
        keys.append(np.concatenate([seen, rows]))
        return rows

    nothing = np.empty(0, dtype=np.int64)
    for members in groups.values():
        prompt = samples[members[0]].prompt
        prompt_rows = add(prompt, 0, nothing)
        for number in members:
            inner = samples[number].tokens[len(prompt) : -1]
            rows = add(inner, len(prompt), prompt_rows) if len(inner) else nothing
            predicting[number] = np.concatenate([prompt_rows[-1:], rows])[: samples[number].response_length]
            sequences[number] = np.concatenate([prompt_rows, rows, [-1]])[: samples[number].length]
    if missing := -end % layout.token_multiple:
        add(np.zeros(missing, dtype=np.int64), 0, nothing)
    return _Pack(
        ids=np.concatenate(ids),
        next_ids=None,
        positions=np.concatenate(positions),
        query_lengths=tuple(map(len, ids)),
        key_lengths=tuple(map(len, keys)),
        key_rows=np.concatenate(keys),
        predicting=np.concatenate(predicting),
        gathered_rows=end,
        rows=np.concatenate(sequences),
        shares_prompts=True,
    )


def _whole_sequences(samples: Sequence[TrainSample], layout: TokenLayout) -> _Pack:
    size = layout.context_size
    unit = 2 * size if size > 1 else 1
    lengths = np.array([sample.length for sample in samples], dtype=np.int64)
    padded = -(-lengths // unit) * unit
    if missing := -int(padded.sum()) % (unit * layout.token_multiple):
        padded = np.append(padded, missing)
    starts = np.cumsum(padded) - padded
    tokens = np.zeros(int(padded.sum()) + 1, dtype=np.int64)
    for start, sample in zip(starts.tolist(), samples, strict=False):
        tokens[start : start + sample.length] = sample.tokens
    held = [_zigzag(starts, padded, rank, size) for rank in range(size)]
    own = held[layout.context_rank]
    row_of = np.full(len(tokens) - 1, -1, dtype=np.int64)
    row_of[own] = np.arange(len(own))
    responses = np.array([sample.response_length for sample in samples], dtype=np.int64)
    predicting = _spans(starts[: len(samples)] + lengths - responses - 1, responses)
    query_lengths, key_lengths = tuple(padded.tolist()), tuple(padded.tolist())
    key_rows = None
    if size > 1:
        chunks = [
            (number, int(length) // unit) for length in padded for number in _chunks_of(layout.context_rank, size)
        ]
        query_lengths = tuple(chunk for _, chunk in chunks)
        key_lengths = tuple((number + 1) * chunk for number, chunk in chunks)
        gathered = np.empty(len(tokens) - 1, dtype=np.int64)
        gathered[np.concatenate(held)] = np.arange(len(gathered))
        spans = zip(np.repeat(starts, 2).tolist(), key_lengths, strict=True)
        key_rows = np.concatenate([gathered[start : start + keys] for start, keys in spans])
    return _Pack(
        ids=tokens[own],
        next_ids=tokens[own + 1],
        positions=own - np.repeat(starts, padded)[own],
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        key_rows=key_rows,
        predicting=row_of[predicting],
        gathered_rows=len(row_of),
        rows=row_of[_spans(starts[: len(samples)], lengths)],
        shares_prompts=False,
    )


def _spans(starts: IntArray, lengths: IntArray) -> IntArray:
    """The numbers from each start on, so many, one after the other."""
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)])


def _chunks_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _zigzag(starts: IntArray, padded: IntArray, rank: int, size: int) -> IntArray:
    """Positions in the pack of whole sequences that context-parallel rank `rank` holds, in its order."""
    if size == 1:
        return np.arange(int(padded.sum()))
    pieces = []
    for start, length in zip(starts.tolist(), padded.tolist(), strict=True):
        chunk = length // (2 * size)
        pieces += [start + number * chunk + np.arange(chunk) for number in _chunks_of(rank, size)]
    return np.concatenate(pieces)


def _packed_sequences(pack: _Pack, routing: Routing | None = None) -> PackedSequences:
    return PackedSequences(
        routing=routing,
        qkv_format="thd",
        cu_seqlens_q=_cumulative(pack.query_lengths),
        cu_seqlens_kv=_cumulative(pack.key_lengths),
        max_seqlen_q=max(pack.query_lengths),
        max_seqlen_kv=max(pack.key_lengths),
        position_ids=to_training_device(pack.positions),
        longest_sequence=int(pack.positions.max()) + 1,
        query_lengths=pack.query_lengths,
        key_lengths=pack.key_lengths,
        key_rows=pack.key_rows,
        gathered_rows=pack.gathered_rows,
    )


def _cumulative(lengths: tuple[int, ...]) -> Tensor:
    return to_training_device(np.cumsum((0, *lengths), dtype=np.int32))


def _mtp_input(pack: _Pack, whole: _Pack, targets: IntArray, follows: NDArray[np.bool_]) -> MtpInput:
    """The MTP layer predicts a token from the hidden state two places before it and the token between."""
    assert whole.next_ids is not None
    rows = None
    if pack.shares_prompts:
        padding = np.zeros(len(whole.ids) - len(pack.rows), dtype=np.int64)
        rows = to_training_device(np.concatenate([np.maximum(pack.rows, 0), padding]))  # any row for a last token
    before = np.concatenate([[-1], whole.predicting[:-1]])
    return MtpInput(
        rows=rows,
        next_ids=to_training_device(whole.next_ids[None]),
        position_ids=to_training_device(whole.positions[None]),
        sequences=_packed_sequences(whole),
        ask=NextTokens(to_training_device(before[follows]), to_training_device(targets[follows])),
    )


def build_microbatch(samples: Sequence[TrainSample], layout: TokenLayout) -> MicroBatch:
    """The pack of `samples` on this rank."""
    prompts = {sample.prompt.tobytes() for sample in samples}
    shared = layout.context_size == 1 and len(prompts) < len(samples)
    pack = _share_prompts(samples, layout) if shared else _whole_sequences(samples, layout)
    responses = np.array([sample.response_length for sample in samples], dtype=np.int64)
    sample_of = np.repeat(np.arange(len(samples)), responses)
    offset_of = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
    targets = np.concatenate([sample.response for sample in samples])
    weights = np.concatenate([sample.loss_mask.astype(np.float32) * np.float32(sample.weight) for sample in samples])
    here = pack.predicting >= 0

    mtp, mtp_weights = None, None
    if layout.with_mtp:
        whole = _whole_sequences(samples, layout) if shared else pack
        follows = np.concatenate([sample.mtp_mask for sample in samples])
        follows &= np.concatenate([[False], whole.predicting[:-1] >= 0])
        of_token = np.repeat(np.array([sample.mtp_weight for sample in samples], dtype=np.float32), responses)
        mtp, mtp_weights = _mtp_input(pack, whole, targets, follows), to_training_device(of_token[follows])

    def aligned(arrays: Sequence[FloatArray | IntArray | None]) -> Tensor | None:
        present = [array for array in arrays if array is not None]
        return to_training_device(np.concatenate(present)[here]) if present else None

    inputs = ModelInput(
        input_ids=to_training_device(pack.ids[None]),
        position_ids=to_training_device(pack.positions[None]),
        sequences=_packed_sequences(pack, _routing(pack, samples, layout)),
        ask=NextTokens(to_training_device(pack.predicting[here]), to_training_device(targets[here])),
        mtp=mtp,
    )
    return MicroBatch(
        inputs=inputs,
        weights=to_training_device(weights[here]),
        mtp_weights=mtp_weights,
        advantages=aligned([sample.advantages for sample in samples]),
        old_log_probs=aligned([sample.old_log_probs for sample in samples]),
        ref_log_probs=aligned([sample.ref_log_probs for sample in samples]),
        rollout_log_probs=aligned([sample.rollout_log_probs for sample in samples]),
        sources=aligned([sample.sources for sample in samples]),
        response_lengths=responses,
        trained_lengths=np.array([int(sample.loss_mask.sum()) for sample in samples], dtype=np.int64),
        sample_of=sample_of[here],
        offset_of=offset_of[here],
        rows=pack.rows,
    )


def _routing(pack: _Pack, samples: Sequence[TrainSample], layout: TokenLayout) -> Routing | None:
    """Where the samples say that tokens were taken. A prompt that several samples share goes where the first of them
    says; padding, last tokens and what no sample tells are NOT_ROUTED."""
    told = [sample.routed_experts for sample in samples]
    shapes = [experts.shape[1:] for experts in told if experts is not None]
    if not (layout.moe_layers and shapes):
        return None
    routed = np.full((len(pack.ids), len(layout.moe_layers), shapes[0][1]), NOT_ROUTED, dtype=np.uint8)
    in_response = np.zeros(len(pack.ids), dtype=np.bool_)
    end = len(pack.rows)
    for sample, experts in zip(reversed(samples), reversed(told), strict=True):
        rows, end = pack.rows[end - sample.length : end], end - sample.length
        response = rows[len(sample.prompt) :]
        in_response[response[response >= 0]] = True
        if experts is not None:
            rows = rows[: len(experts)]
            routed[rows[rows >= 0]] = experts[rows >= 0][:, layout.moe_layers]
    own = [np.split(rows, layout.token_multiple)[layout.tensor_rank] for rows in (routed, in_response)]
    return Routing(to_training_device(np.ascontiguousarray(own[0].transpose(1, 0, 2))), to_training_device(own[1]))
