"""Samples of a run: found by what they are and say, and opened one by one.

Letters: M samples of the run.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeInt

from recipe.run.sample_index import SampleIndex
from recipe.run.shown_tokens import read_tokens
from recipe.system.errors import UserError
from recipe.system.json_text import parse_json

ROWS = 50
"""Of an answer at most."""
SEARCH_S = 0.7
"""Longest that a search goes through texts before it answers with what it has."""
BEGINNING = 160
"""Characters of a text in a row."""
LONGEST_TEXT = 100_000
"""Characters of a text shown whole; of a longer one its beginning and its end, half of this each."""

GRADE_TEXT = {
    "graded": "The grader took {answer} for the answer; the label is {label}; the reward is {reward:g}.",
    "no_answer": "The grader found no answer in the response; the label is {label}.",
    "truncated": "The response was cut off before it gave an answer; the label is {label}.",
    "grader_failed": "The grader failed or ran out of time (--rm-timeout-s); the sample counts as wrong.",
    "environment": "--custom-generate-function-path has given the reward, {reward:g}.",
    "left_out": "There is no response: --custom-generate-function-path failed, as the log says; nothing is learned.",
}
"""Why a sample has its reward, by its grade."""


def _blank_is_none(value: object) -> object:
    return None if value == "" else value


Blank = BeforeValidator(_blank_is_none)


class Query(BaseModel):
    """Which samples are looked for. Everything that is not given is not asked of them."""

    model_config = ConfigDict(extra="ignore")

    text: str = ""
    """In the prompt or the response, as it is written."""
    prompt: Annotated[int | None, Blank] = None
    """Line of the prompt in its file."""
    group: Annotated[int | None, Blank] = None
    min_reward: Annotated[float | None, Blank] = None
    max_reward: Annotated[float | None, Blank] = None
    min_length: Annotated[float | None, Blank] = None
    max_length: Annotated[float | None, Blank] = None
    finish: str = ""
    grade: str = ""
    from_step: Annotated[int | None, Blank] = None
    to_step: Annotated[int | None, Blank] = None
    before_step: Annotated[int | None, Blank] = None
    """Where a search that ran out of time goes on."""
    sort: Literal["newest", "reward", "length", "advantage"] = "newest"
    descending: bool = True
    offset: NonNegativeInt = 0


@dataclass(frozen=True)
class Found:
    """What a query finds."""

    places: NDArray[np.int64]
    """Of the samples among the M."""
    complete: bool
    searched_from_step: int
    """Texts of earlier steps were not looked at."""


class SampleFiles:
    """The files rollouts/*.jsonl of a run, with the index of their numbers."""

    def __init__(self, run: Path, index: SampleIndex) -> None:
        self._run, self._index = run, index

    def find(self, query: Query) -> dict[str, Any]:
        """The rows that a query finds, as the page has them."""
        index = self._index
        found = self._searched(query, np.flatnonzero(self._mask(query)))
        order = self._order(query, found.places)[query.offset : query.offset + ROWS]
        return {
            "matches": len(found.places),
            "complete": found.complete,
            "searched_from_step": found.searched_from_step,
            "finish_reasons": index.names["finish_reason"],
            "grades": index.names["grade"],
            "rows": self._rows(order.tolist()),
        }

    def _mask(self, query: Query) -> NDArray[np.bool_]:
        """[M] which samples have the numbers that are asked for."""
        index = self._index
        mask = np.ones(len(index), dtype=np.bool_)
        least = {"reward": query.min_reward, "response_length": query.min_length}
        most = {"reward": query.max_reward, "response_length": query.max_length}
        for name, bound in least.items():
            if bound is not None:
                mask &= index[name] >= bound - _ROUNDING
        for name, bound in most.items():
            if bound is not None:
                mask &= index[name] <= bound + _ROUNDING
        if query.from_step is not None:
            mask &= index["rollout"] >= query.from_step - 1
        for last in (query.to_step, None if query.before_step is None else query.before_step - 1):
            if last is not None:
                mask &= index["rollout"] <= last - 1
        for name, wanted in (("prompt_index", query.prompt), ("group_index", query.group)):
            if wanted is not None:
                mask &= index[name] == wanted
        for name, word in (("finish_reason", query.finish), ("grade", query.grade)):
            if word:
                known = index.names[name]
                mask &= index[name] == (known.index(word) if word in known else -1)
        return mask

    def _searched(self, query: Query, places: NDArray[np.int64]) -> Found:
        """Those of the places, ascending, whose text has what is looked for; the newest are looked at first."""
        first = int(self._index["rollout"][places[0]]) + 1 if len(places) else 1
        if not query.text:
            return Found(places, True, first)
        rollouts, lines = self._index["rollout"][places], self._index["line"][places]
        deadline = time.monotonic() + SEARCH_S
        kept: list[int] = []
        mark = _as_written(query.text)
        for rollout in np.unique(rollouts)[::-1].tolist():
            wanted = dict(zip(lines[rollouts == rollout].tolist(), places[rollouts == rollout].tolist(), strict=True))
            for number, line in enumerate(self._lines(rollout)):
                if number in wanted and mark in line and _has(line, query.text):
                    kept.append(wanted[number])
            if rollout >= first and time.monotonic() > deadline:
                return Found(np.array(sorted(kept), dtype=np.int64), False, rollout + 1)
        return Found(np.array(sorted(kept), dtype=np.int64), True, first)

    def _order(self, query: Query, places: NDArray[np.int64]) -> NDArray[np.int64]:
        if query.sort == "newest":
            return places[::-1] if query.descending else places
        values = self._index[{"length": "response_length"}.get(query.sort, query.sort)][places]
        return places[np.argsort(-values if query.descending else values, kind="stable")]

    def _lines(self, rollout: int) -> list[bytes]:
        path = self._run / "rollouts" / f"{rollout:06}.jsonl"
        return path.read_bytes().split(b"\n") if path.is_file() else []

    def _rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        read: dict[int, list[bytes]] = {}
        rows = []
        for place in places:
            rollout, line = int(self._index["rollout"][place]), int(self._index["line"][place])
            lines = read.setdefault(rollout, self._lines(rollout))
            rows.append(_row(rollout, line, _record(lines, line)))
        return rows

    def sample(self, rollout: int, line: int) -> dict[str, Any]:
        """A sample with its group and, where they were kept, its tokens. Raises UserError if there is none such."""
        lines = self._lines(rollout)
        record = _record(lines, line)
        if not record:
            raise UserError(f"step {rollout + 1} has no sample {line}: it was not made, or its file was removed")
        group = [
            _row(rollout, number, other)
            for number in range(len(lines))
            if (other := _record(lines, number)) and other["group_index"] == record["group_index"]
        ]
        tokens = read_tokens(self._run, rollout, line)
        of_trainer = None if tokens is None else tokens.trainer_log_probs
        return {
            **_row(rollout, line, record),
            **_text("prompt", record["prompt"]),
            **_text("response", record["response"]),
            **{name: record[name] for name in ("label", "weight_versions", "mean_log_prob")},
            "grade_text": grade_text(record),
            "group_rows": group,
            "tokens": None if tokens is None else {**vars(tokens)},
            "tokens_missing": None
            if tokens is not None
            else "The tokens of this sample were not kept one by one: --keep-token-groups says of how many groups of a "
            "step they are.",
            "differences_missing": None
            if tokens is None or of_trainer is not None
            else "The trainer's log-probs of this sample are not known.",
        }


_ROUNDING = 1e-6


def _as_written(text: str) -> bytes:
    """How the file has a text: as JSON, which leaves other alphabets as they are."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass")


def _has(line: bytes, text: str) -> bool:
    record = parse_json(line)
    return any(text in str(record[name]) for name in ("prompt", "response"))


def _record(lines: Sequence[bytes], number: int) -> Mapping[str, Any]:
    """The sample in a line; nothing where there is none that can be read."""
    try:
        record: Mapping[str, Any] = parse_json(lines[number]) if lines[number] else {}
        return record
    except (IndexError, ValueError):
        return {}


def _row(rollout: int, line: int, record: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "source",
        "prompt_index",
        "prompt_length",
        "response_length",
        "reward",
        "advantage",
        "finish_reason",
        "grade",
        "answer",
    )
    return {
        "rollout": rollout,
        "line": line,
        "step": rollout + 1,
        "group": record.get("group_index"),
        **{name: record.get(name) for name in names},
        "prompt": record.get("prompt", "")[:BEGINNING],
        "response": record.get("response", "")[:BEGINNING],
    }


def _text(name: str, text: str) -> dict[str, Any]:
    half = LONGEST_TEXT // 2
    if len(text) <= LONGEST_TEXT:
        return {name: text, f"{name}_left_out": 0, f"{name}_end": ""}
    return {name: text[:half], f"{name}_left_out": len(text) - 2 * half, f"{name}_end": text[-half:]}


def grade_text(record: Mapping[str, Any]) -> str:
    """Why a sample has its reward, in a sentence."""
    if record["grade"] == "graded" and record["answer"] is None:
        return f"The reward function gave {record['reward']:g}; the label is {record['label']!r}."
    form = GRADE_TEXT.get(record["grade"], "The grader said {grade}.")
    words = {name: repr(record[name]) for name in ("answer", "label", "grade")}
    return form.format(**words, reward=record["reward"])
