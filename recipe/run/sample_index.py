"""samples.jsonl: the numbers of every sample, a line a rollout, so that 768,000 samples are looked through in a moment.

Letters: N samples of a rollout, M of all rollouts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recipe.run.journal import LineReader

if TYPE_CHECKING:
    from recipe.run.directory import SampleRecord

FILE = "samples.jsonl"
NUMBERS = {
    "group_index": np.int32,
    "prompt_index": np.int32,
    "prompt_length": np.int32,
    "response_length": np.int32,
    "reward": np.float32,
    "advantage": np.float32,
}
"""Fields of a sample that are indexed as they are."""
WORDS = ("finish_reason", "grade")
"""Fields with few values, which a line names once."""


def index_line(rollout_id: int, samples: Sequence["SampleRecord"]) -> dict[str, Any]:
    """The line of a rollout: lists of N numbers, in the order of its file; for WORDS positions in a list of names."""
    line: dict[str, Any] = {"rollout_id": rollout_id}
    line |= {name: [getattr(sample, name) for sample in samples] for name in NUMBERS}
    for name in WORDS:
        values = [getattr(sample, name) for sample in samples]
        names = sorted(set(values))
        line |= {f"{name}s": names, name: [names.index(value) for value in values]}
    return line


class SampleIndex:
    """The samples of a run, as far as `refresh` has found them, in the order of their making."""

    def __init__(self, run: Path) -> None:
        self._reader = LineReader(run / FILE)
        self.names: dict[str, list[str]] = {name: [] for name in WORDS}
        """The values of each of WORDS, in the order in which they came."""
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._joined: dict[str, NDArray[Any]] | None = None

    def refresh(self, limit: int | None = None) -> bool:
        """Reads what was added since the last time, `limit` bytes at most; all of it if the file was cut. Returns
        whether there was any. Raises UserError if it is damaged."""
        lines, anew = self._reader.new_lines(limit)
        if anew:
            self._blocks.clear()
        self._blocks += [self._block(line) for line in lines]
        if lines or anew:
            self._joined = None
        return bool(lines)

    def _block(self, line: dict[str, Any]) -> dict[str, NDArray[Any]]:
        count = len(line["reward"])
        block: dict[str, NDArray[Any]] = {name: np.array(line[name], dtype=kind) for name, kind in NUMBERS.items()}
        block["rollout"] = np.full(count, line["rollout_id"], dtype=np.int32)
        block["line"] = np.arange(count, dtype=np.int32)
        for name in WORDS:
            known = self.names[name]
            known += [value for value in line[f"{name}s"] if value not in known]
            places = np.array([known.index(value) for value in line[f"{name}s"]], dtype=np.int16)
            block[name] = places[np.array(line[name], dtype=np.int16)]
        return block

    def __len__(self) -> int:
        return sum(len(block["reward"]) for block in self._blocks)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """[M] a field of NUMBERS, `rollout`, `line` (in the rollout's file), or of WORDS as positions in `names`."""
        if self._joined is None:
            fields = (*NUMBERS, *WORDS, "rollout", "line")
            empty = [{one: np.zeros(0, dtype=NUMBERS.get(one, np.int32)) for one in fields}]
            blocks = self._blocks or empty
            self._joined = {one: np.concatenate([block[one] for block in blocks]) for one in fields}
            if self._blocks:
                self._blocks = [self._joined]
        return self._joined[name]
