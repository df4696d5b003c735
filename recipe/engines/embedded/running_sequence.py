"""One response under way, and the request it belongs to."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sampling:
    """SGLang's sampling parameters, resolved."""

    max_new_tokens: int
    temperature: float
    """Greater than 0; greedy rows have 1."""
    greedy: bool
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    """All tokens that end the response, the model's own among them."""


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A prompt and, once it is finished, the response to it. Only the engine's thread changes it."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    returns_input_log_probs: bool = False
    input_log_probs: list[float] = field(default_factory=list)
    """Of the prompt's tokens but the first, at temperature 1, if they are to be returned."""
    returns_routed_experts: bool = False
    routed_experts: NDArray[np.int32] | None = None
    """[prompt and response - 1, L, K] where the tokens were taken, if that is to be returned."""
    version: str = ""
    """Of the weights that made the newest tokens."""
    older: list[tuple[str, int]] = field(default_factory=list)
    """Versions of weights that were replaced while it was under way, and the tokens that were there then."""
    finish_reason: dict[str, Any] | None = None

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Prompt and response, as far as the engine's thread has written it down."""
        return (*self.prompt_ids, *self.output_ids)

    def outlive(self, version: str, tokens: int) -> None:
        """Weights of this version are replaced when it has so many tokens: they made those that no older ones did."""
        if tokens > (self.older[-1][1] if self.older else 0):
            self.older.append((version, tokens))

    def finish(self, reason: dict[str, Any], version: str) -> None:
        self.finish_reason, self.version = reason, version

    def version_spans(self) -> list[dict[str, Any]]:
        """Whose weights made which tokens, as SGLang tells it: the spans follow one another, and there is one at
        least."""
        count, spans = len(self.output_ids), list[dict[str, Any]]()
        for version, end in [*self.older, (self.version, count)]:
            start = spans[-1]["end"] if spans else 0
            if end > start or not spans:
                spans.append({"version": version, "start": start, "end": end})
        return spans


@dataclass(slots=True)
class Request:
    """The sequences of one HTTP request and the future of their end."""

    sequences: list[RunningSequence]
    done: asyncio.Future[None]
    pending: int = 0

    def __post_init__(self) -> None:
        self.pending = len(self.sequences)
