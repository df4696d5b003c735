"""Packed segments in the padded grids that torch's dense attention kernels take."""

import numpy as np

from recipe.megatron.gather import IntArray, RowGather

SIMILAR = 0.8
"""Segments of at least this share of a grid's length are put into that grid."""
SHORTEST, MOST_WORK = 1024, 1.3
"""Where grids are used: for segments this long, if they make at most so many times the products that are needed."""


class SegmentGrids:
    """A pack's segments in padded grids for torch's dense causal attention, segments of similar length in one grid.

    A segment's keys begin with its row of the grid, and its queries end where its keys do: the places before them, and
    behind a segment's end, hold some other row. Those before the end of a segment ask for nothing that is used, those
    behind it are seen by none that is.
    """

    def __init__(
        self,
        query_lengths: tuple[int, ...],
        key_lengths: tuple[int, ...],
        key_rows: IntArray,
        gathered_rows: int,
        *,
        few_shapes: bool,
    ) -> None:
        queries, keys = np.array(query_lengths), np.array(key_lengths)
        self.shapes = _grid_shapes(key_lengths, few_shapes)
        """(segments, places) of each grid."""
        self.sizes = [segments * places for segments, places in self.shapes]
        order = np.argsort(-keys, kind="stable")
        width = np.repeat([places for _, places in self.shapes], [segments for segments, _ in self.shapes])
        starts = np.empty_like(keys)
        starts[order] = np.cumsum(width) - width
        places_of_keys, places_of_queries = _runs(starts, keys), _runs(starts + keys - queries, queries)
        key_index, query_index = np.full(sum(self.sizes), -1), np.full(sum(self.sizes), -1)
        key_index[places_of_keys] = key_rows
        query_index[places_of_queries] = np.arange(len(places_of_queries))
        self.query = RowGather.of(query_index, len(places_of_queries))
        self.key = RowGather.of(key_index, gathered_rows)
        self.output = RowGather.of(places_of_queries, sum(self.sizes))


def grids_are_faster(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> bool:
    """Whether cuDNN on grids beats torch's variable-length kernel: on an H200 (torch 2.11, 20 heads of 256) a forward
    and backward pass over 8,192 tokens is 1.6 to 1.7 times as fast on sequences of 2,048 to 8,192, less on shorter."""
    queries, keys = np.array(query_lengths), np.array(key_lengths)
    made = sum(segments * places**2 for segments, places in _grid_shapes(key_lengths, few_shapes=True))
    needed = float((queries * (2 * keys - queries)).sum())
    return max(query_lengths) >= SHORTEST and made <= MOST_WORK * needed


def _runs(starts: IntArray, lengths: IntArray) -> IntArray:
    """Consecutive numbers from each start on, one run after the other."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def _grid_shapes(lengths: tuple[int, ...], few_shapes: bool) -> list[tuple[int, int]]:
    """(segments, places) of grids that hold segments of these lengths, longest first: one grid, or with `few_shapes` as
    suits cuDNN, which plans every shape that it has not met: segments of similar length in a grid, and 16 numbers of
    places from each power of two to the next."""
    shapes: list[tuple[int, int]] = []
    for length in sorted(lengths, reverse=True):
        if shapes and (not few_shapes or length >= SIMILAR * shapes[-1][1]):
            shapes[-1] = (shapes[-1][0] + 1, shapes[-1][1])
            continue
        step = max(64, 2 ** (length.bit_length() - 1) // 16) if few_shapes else 1
        shapes.append((1, -(-length // step) * step))
    return shapes
