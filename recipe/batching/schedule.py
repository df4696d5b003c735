"""From the samples of an optimizer step to every rank's microbatches."""

from collections.abc import Callable, Sequence

from recipe.batching.packing import pack, pack_to_count
from recipe.batching.partition import partition_balanced

Microbatch = list[int]
"""Indices of the samples that are computed together."""


def schedule(
    lengths: Sequence[int],
    *,
    data_parallel_size: int,
    max_tokens: int | None = None,
    micro_batch_size: int = 1,
    count_multiple: int = 1,
    cost: Callable[[int], float] | None = None,
) -> list[list[Microbatch]]:
    """The microbatches of every data-parallel rank, in the order in which the rank computes them.

    With `max_tokens` microbatches are packs of at most so many tokens (a longer sample is one by itself), else they
    are of `micro_batch_size` samples. Their number divides by `count_multiple`, as an interleaved pipeline needs it to
    by its stages. With `cost`, the cost of a sample of a given length, samples are dealt to ranks
    so that costs are balanced; otherwise in turn.

    Invariants: every sample is in exactly one microbatch; every rank has the same number of samples and of
    microbatches, none of them empty; packs descend by tokens, so that ranks that exchange tokens with each other (as
    expert parallelism does in every layer) work on packs of similar size at the same time; the result depends on the
    arguments alone.

    Raises ValueError if the samples do not divide evenly by the ranks, or a rank's by `micro_batch_size` and
    `count_multiple`.
    """
    size = len(lengths)
    if size % data_parallel_size:
        raise ValueError(f"{size} samples do not divide evenly among {data_parallel_size} data-parallel ranks")
    if cost is None:
        ranks = [list(range(rank, size, data_parallel_size)) for rank in range(data_parallel_size)]
    else:
        ranks = partition_balanced([cost(length) for length in lengths], data_parallel_size, equal_size=True)
    if (size // data_parallel_size) % count_multiple:
        raise ValueError(f"{size // data_parallel_size} samples of a rank do not divide evenly by {count_multiple}")
    if max_tokens is None:
        return [_chunks(members, micro_batch_size) for members in ranks]
    rank_lengths = [[lengths[i] for i in members] for members in ranks]
    count = max(len(pack(own, max_tokens)) for own in rank_lengths)
    count += -count % count_multiple
    return [
        [[members[i] for i in chosen] for chosen in pack_to_count(own, max_tokens, count)]
        for members, own in zip(ranks, rank_lengths, strict=True)
    ]


def _chunks(members: list[int], size: int) -> list[Microbatch]:
    if len(members) % size:
        raise ValueError(f"{len(members)} samples of a rank do not divide evenly into microbatches of {size}")
    return [members[start : start + size] for start in range(0, len(members), size)]
