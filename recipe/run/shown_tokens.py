"""tokens/ROLLOUT.jsonl: some of a rollout's samples token by token, for `make watch`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.system.files import atomic_write_bytes
from recipe.system.json_text import parse_json

FOLDER = "tokens"
DIGITS = 4
"""Of log-probs and advantages, after the point."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most."""


@dataclass(frozen=True, kw_only=True)
class ShownTokens:
    """The R response tokens of a sample."""

    line: int
    """Of the sample in its rollout's file, from 0."""
    pieces: Sequence[str]
    """[R] their text; of tokens that are parts of one character the last has it, and the others have none."""
    log_probs: Sequence[float | None]
    """[R] at generation, by the engine, in nats; None for what the model did not generate and, once it is read again,
    for what is not finite."""
    advantages: Sequence[float | None]
    """[R]"""
    trainer_log_probs: Sequence[float | None] | None
    """[R] by the trainer before it learned from them; None where that is not known."""


def path_of(run: Path, rollout_id: int) -> Path:
    """Where a rollout's shown tokens lie."""
    return run / FOLDER / f"{rollout_id:06}.jsonl"


def write_tokens(run: Path, rollout_id: int, samples: Sequence[ShownTokens]) -> None:
    """Writes a rollout's file. Raises OSError if it cannot."""
    (run / FOLDER).mkdir(exist_ok=True)
    lines = (json.dumps(_rounded(sample), ensure_ascii=True) + "\n" for sample in samples)
    atomic_write_bytes(path_of(run, rollout_id), "".join(lines).encode())


def _rounded(sample: ShownTokens) -> dict[str, Any]:
    return {
        name: _finite(np.round(np.asarray(value, dtype=np.float64), DIGITS).tolist())
        if name.endswith(("log_probs", "advantages")) and value is not None
        else value
        for name, value in asdict(sample).items()
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no other numbers; a run that diverges has."""
    return [value if math.isfinite(value) else None for value in values]


def read_all_tokens(run: Path, rollout_id: int) -> list[ShownTokens]:
    """Those of all samples of a rollout of which they were kept."""
    path = path_of(run, rollout_id)
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [ShownTokens(**parse_json(line)) for line in lines]


def read_tokens(run: Path, rollout_id: int, line: int) -> ShownTokens | None:
    """Those of the sample in a line of a rollout's file; None if they were not kept."""
    return next((found for found in read_all_tokens(run, rollout_id) if found.line == line), None)


def pieces_of(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """[R] the text of each token, where a character may take several."""
    pieces: list[str] = []
    open_since: int | None = None
    for place, token in enumerate(ids):
        start = place if open_since is None else open_since
        text = decode([token] if open_since is None else ids[start : place + 1])
        incomplete = text.endswith(_REPLACEMENT) and place - start + 1 < _LONGEST_CHARACTER and place + 1 < len(ids)
        pieces.append("" if incomplete else text)
        open_since = start if incomplete else None
    return pieces
