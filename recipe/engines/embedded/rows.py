"""The sequences that are being generated, a row each: what changes with every token is kept in arrays."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from recipe.engines.embedded.cache import LatentCache
from recipe.engines.embedded.running_sequence import RunningSequence

NO_TOKEN = -1

Number = TypeVar("Number", bound=np.generic)


class Rows:
    """Rows 0 to `count` - 1 are in use, without gaps: the last row moves into a hole, in the cache too."""

    def __init__(self, size: int, cache: LatentCache) -> None:
        self.count = 0
        self.sequences: list[RunningSequence] = []
        self._cache = cache
        self.position = np.zeros(size, np.int64)
        """Tokens in the cache."""
        self.token = np.zeros(size, np.int64)
        """The newest token, not yet in the cache."""
        self.generated = np.zeros(size, np.int64)
        self.limit = np.zeros(size, np.int64)
        self.seed = np.zeros(size, np.int64)
        self.greedy = np.zeros(size, np.bool_)
        self.temperature = np.ones(size, np.float32)
        self.top_k = np.zeros(size, np.int64)
        self.top_p = np.ones(size, np.float32)
        self.has_stop_strings = np.zeros(size, np.bool_)
        self._stops = np.full((size, 1), NO_TOKEN)
        self._tokens = np.zeros((size, 1), np.int64)
        self._log_probs = np.zeros((size, 1), np.float32)

    def add(self, sequence: RunningSequence) -> int:
        """Gives the sequence a row, with the tokens that it has; its number."""
        row, sampling, made = self.count, sequence.sampling, len(sequence.output_ids)
        self.sequences.append(sequence)
        self.count += 1
        self.position[row] = len(sequence.known_ids)
        self.generated[row] = made
        self._tokens, self._log_probs = _widened(self._tokens, made, 0), _widened(self._log_probs, made, 0)
        self._tokens[row, :made], self._log_probs[row, :made] = sequence.output_ids, sequence.log_probs
        self.limit[row] = sampling.max_new_tokens
        self.seed[row] = sampling.seed
        self.greedy[row] = sampling.greedy
        self.temperature[row] = sampling.temperature
        self.top_k[row], self.top_p[row] = sampling.top_k, sampling.top_p
        self.has_stop_strings[row] = bool(sampling.stop)
        self._stops = _widened(self._stops, len(sampling.stop_token_ids), NO_TOKEN)
        self._stops[row] = NO_TOKEN
        self._stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        return row

    def record(self, rows: slice, tokens: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32]) -> None:
        """Takes the new token of each of `rows`, which must all have their former ones in the cache."""
        columns = self.generated[rows]
        width = int(columns.max()) + 1
        self._tokens = _widened(self._tokens, width, 0)
        self._log_probs = _widened(self._log_probs, width, 0)
        numbers = np.arange(rows.start, rows.stop)
        self._tokens[numbers, columns] = tokens
        self._log_probs[numbers, columns] = log_probs
        self.token[rows] = tokens
        self.generated[rows] += 1

    def stopped(self, rows: slice) -> npt.NDArray[np.bool_]:
        """For each of `rows`, whether its newest token is one that ends it."""
        stopped: npt.NDArray[np.bool_] = (self._stops[rows] == self.token[rows, None]).any(axis=1)
        return stopped

    def collect(self, row: int) -> None:
        """Writes a row's tokens and log-probs to its sequence."""
        sequence = self.sequences[row]
        count = self.generated[row]
        sequence.output_ids = self._tokens[row, :count].tolist()
        sequence.log_probs = self._log_probs[row, :count].tolist()

    def collect_experts(self, row: int) -> None:
        """Writes where a row's tokens were routed to its sequence, if it is to return that."""
        sequence = self.sequences[row]
        if sequence.returns_routed_experts:
            sequence.routed_experts = self._cache.routed_experts(row, int(self.position[row])).numpy().copy()

    def newest(self, row: int, count: int) -> list[int]:
        """At most `count` of a row's latest response tokens."""
        end = int(self.generated[row])
        newest: list[int] = self._tokens[row, max(0, end - count) : end].tolist()
        return newest

    def remove(self, gone: npt.NDArray[np.int64]) -> None:
        """Frees rows (ascending)."""
        kept = self.count - len(gone)
        holes = gone[gone < kept]
        last = np.arange(kept, self.count)
        movers = last[~np.isin(last, gone)]
        if len(holes):
            for array in self._arrays():
                array[holes] = array[movers]
            self._cache.copy(torch.from_numpy(movers), torch.from_numpy(holes), int(self.position[movers].max()))
            for hole, mover in zip(holes, movers, strict=True):
                self.sequences[hole] = self.sequences[mover]
        del self.sequences[kept:]
        self.count = kept

    def _arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (
            self.position,
            self.token,
            self.generated,
            self.limit,
            self.seed,
            self.greedy,
            self.temperature,
            self.top_k,
            self.top_p,
            self.has_stop_strings,
            self._stops,
            self._tokens,
            self._log_probs,
        )


def _widened(array: npt.NDArray[Number], width: int, fill: int) -> npt.NDArray[Number]:
    """The array with at least `width` columns; grows by doubling."""
    if width <= array.shape[1]:
        return array
    wider = np.full((len(array), max(width, 2 * array.shape[1])), fill, array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
