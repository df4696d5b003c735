"""Putting sequences together into packs of bounded size."""

import bisect
import heapq
from collections.abc import Sequence

from recipe.batching.partition import partition_balanced


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Few packs of at most `max_tokens` tokens, by best-fit decreasing (at most 11/9 of the fewest, plus one).

    Invariants: every index is in exactly one pack; a pack has at most `max_tokens` tokens, or is a single sequence
    that is longer by itself; no pack is empty; the same lengths give the same packs. Takes O(n log n) comparisons.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            free, number = max_tokens, len(packs)
            packs.append([index])
        else:
            free, number = room.pop(place)
            packs[number].append(index)
        bisect.insort(room, (free - lengths[index], number))
    return [sorted(members) for members in packs]


def pack_to_count(lengths: Sequence[int], max_tokens: int, count: int) -> list[list[int]]:
    """`pack`, with exactly `count` packs: the largest ones are halved until there are enough.

    The invariants of `pack` hold, and the packs are ordered by tokens, largest first. Raises ValueError if `count` is
    fewer than `pack` needs, or more than there are sequences.
    """

    def ordered(members: list[int]) -> tuple[bool, int, list[int]]:
        return (len(members) == 1, -sum(lengths[i] for i in members), members)

    heap = [ordered(members) for members in pack(lengths, max_tokens)]
    if not len(heap) <= count <= len(lengths):
        raise ValueError(f"{len(lengths)} sequences that need {len(heap)} packs cannot be put into {count}")
    heapq.heapify(heap)
    while len(heap) < count:
        members = heapq.heappop(heap)[2]
        for half in partition_balanced([lengths[i] for i in members], 2, equal_size=False):
            heapq.heappush(heap, ordered([members[i] for i in half]))
    return [members for _, _, members in sorted(heap, key=lambda entry: entry[1:])]
