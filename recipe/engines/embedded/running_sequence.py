"""One response under way, and the request it belongs to."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """SGLang's sampling parameters, resolved: nothing is optional any more."""

    max_new_tokens: int
    temperature: float
    """Greater than 0; greedy rows have 1."""
    greedy: bool
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    """All tokens that end the response, the model's own among them."""
    no_stop_trim: bool
    skip_special_tokens: bool


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were made under one version of the weights."""

    version: str
    start: int
    end: int


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A prompt and the response to it so far. Only the engine's thread changes it."""

    rid: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    with_log_probs: bool
    logprob_start: int | None
    """First prompt position whose log-prob is wanted."""
    top_logprobs: int
    """How many of the most likely tokens are wanted beside each response token."""
    arrived: float = field(default_factory=time.monotonic)
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    input_log_probs: list[float | None] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: dict[str, Any] | None = None
    finished: float = 0.0

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Prompt and response so far: what must be read before the next token."""
        return (*self.prompt_ids, *self.output_ids)

    def close_span(self, version: str) -> None:
        """Notes that the tokens since the last span were made under `version`."""
        start = self.spans[-1].end if self.spans else 0
        if len(self.output_ids) == start:
            return
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        self.spans.append(VersionSpan(version, start, len(self.output_ids)))

    def finish(self, reason: dict[str, Any], version: str) -> None:
        self.close_span(version)
        self.spans = self.spans or [VersionSpan(version, 0, 0)]
        self.finish_reason = reason
        self.finished = time.monotonic()


@dataclass(slots=True)
class Request:
    """The sequences of one HTTP request and the future of their end."""

    sequences: list[RunningSequence]
    done: asyncio.Future[None]
    pending: int = 0

    def __post_init__(self) -> None:
        self.pending = len(self.sequences)
