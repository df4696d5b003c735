"""Dividing numbers into parts of nearly equal sums, by largest differencing (Karmarkar and Karp, "The differencing
method of set partitioning", 1982; for several parts: Michiels et al., "Performance ratios for the differencing
method applied to the balanced multiway number partitioning problem", 2003), and by exchanges where parts must be of
one size, which differencing alone does badly on long-tailed costs."""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-3
"""Parts of one size are evened out until the costliest is above the mean by no more than this share of it."""


@dataclass(frozen=True)
class _Part:
    cost: float
    items: tuple[int, ...]

    def __add__(self, other: "_Part") -> "_Part":
        return _Part(self.cost + other.cost, self.items + other.items)


_Parts = list[_Part]
"""A partial division, costliest part first. Parts still empty are not written down, but there are `count` in all."""


def partition_balanced(costs: Sequence[float], count: int, *, equal_size: bool) -> list[list[int]]:
    """Divides the indices of `costs` (none negative) into `count` parts whose summed costs are nearly equal.

    Invariants: every index is in exactly one part; within a part indices ascend, and parts are ordered by their first
    index, empty ones last; the same costs give the same parts. With `equal_size` every part has len(costs) / count
    indices. A part is empty only if there are fewer costs than parts.

    Raises ValueError if `equal_size` is asked for and `count` does not divide the number of costs.
    """
    size = len(costs)
    if count < 1:
        raise ValueError(f"cannot divide into {count} parts")
    if equal_size and size % count:
        raise ValueError(f"{size} samples cannot be divided into {count} parts of equal size")
    descending = [_Part(costs[index], (index,)) for index in sorted(range(size), key=lambda i: (-costs[i], i))]
    stride = count if equal_size else 1
    divisions = [descending[start : start + stride] for start in range(0, size, stride)]
    heap = [(-_spread(parts, count), order, parts) for order, parts in enumerate(divisions)]
    heapq.heapify(heap)
    for order in range(len(heap), 2 * len(heap) - 1):
        widest, next_widest = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = _merge(widest, next_widest, count)
        heapq.heappush(heap, (-_spread(merged, count), order, merged))
    parts = [list(part.items) for part in heap[0][2]] if heap else []
    if equal_size and parts:
        _even_out(parts, costs)
    return sorted(map(sorted, parts)) + [[] for _ in range(count - len(parts))]


def _spread(parts: _Parts, count: int) -> float:
    return parts[0].cost - (parts[-1].cost if len(parts) == count else 0.0)


def _merge(first: _Parts, second: _Parts, count: int) -> _Parts:
    """Puts the costliest parts of one together with the cheapest of the other, empty ones before all, so that the
    spreads of the two cancel out."""
    paired = max(0, len(first) + len(second) - count)
    alone = first[: len(first) - paired] + second[: len(second) - paired]
    together = [
        a + b for a, b in zip(first[len(first) - paired :], reversed(second[len(second) - paired :]), strict=True)
    ]
    return sorted(alone + together, key=lambda part: (-part.cost, part.items))


def _even_out(parts: list[list[int]], costs: Sequence[float]) -> None:
    """Lets the costliest part exchange an item with another part, the cheapest that can, until it is within TOLERANCE
    of the mean or no exchange makes it cheaper."""
    sums = [sum(costs[item] for item in part) for part in parts]
    mean = sum(sums) / len(parts)
    for part in parts:
        part.sort(key=costs.__getitem__)
    while max(sums) > mean * (1 + TOLERANCE):
        top = sums.index(max(sums))
        for other in sorted(range(len(parts)), key=sums.__getitem__):
            exchange = _best_exchange(parts[top], parts[other], costs, sums[top] - sums[other], mean * TOLERANCE / 4)
            if exchange is not None:
                break
        else:
            return
        given, taken = exchange
        parts[top].remove(given)
        parts[other].remove(taken)
        bisect.insort(parts[top], taken, key=costs.__getitem__)
        bisect.insort(parts[other], given, key=costs.__getitem__)
        moved = costs[given] - costs[taken]
        sums[top], sums[other] = sums[top] - moved, sums[other] + moved


def _best_exchange(
    giver: list[int], taker: list[int], costs: Sequence[float], gap: float, least: float
) -> tuple[int, int] | None:
    """The items to exchange between two parts, each sorted by cost, whose sums differ by `gap`, so that it is best
    halved; None if no exchange lowers the greater sum by more than `least`."""
    best, miss = None, gap / 2 - least
    for given in giver:
        place = bisect.bisect_left(taker, costs[given] - gap / 2, key=costs.__getitem__)
        for taken in taker[max(0, place - 1) : place + 1]:
            if abs(costs[given] - costs[taken] - gap / 2) < miss:
                best, miss = (given, taken), abs(costs[given] - costs[taken] - gap / 2)
    return best
