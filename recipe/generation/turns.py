"""What a function of `--custom-generate-function-path` works with: an engine that goes on with its sample's own tokens.

The function, `async def generate(sample, engine, settings)`, awaits `engine.generate()` for a turn of the model and
adds what the model is to read next by `sample.append_environment`. Its state is the sample: one that was aborted is
given to it once more, and `engine.generate` then goes on with the turn under way, or tells the one without an answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from recipe.config import RolloutConfig
from recipe.generation.continuation import rejoin, text_of_turn
from recipe.sampling.sample import FinishReason, Sample
from recipe.sampling.sampling_params import SamplingParams
from recipe.sampling.sglang_response import SampleAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Codec:
    """Between text and tokens, by the model's tokenizer, special tokens included."""

    tokenizer: "PreTrainedTokenizerFast"

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, as it is."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """What a function is told of the run."""

    sampling: SamplingParams
    """Of the training or of the evaluation that the sample is for; `max_new_tokens` bounds the whole response."""
    rollout: RolloutConfig | None
    codec: Codec | None
    """Both are there for a function of the user's."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, for `append_environment`."""
        assert self.codec is not None
        return self.codec.encode(text)


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model has said since the environment spoke last."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    """Without what ended it."""
    finish_reason: FinishReason
    """STOP; LENGTH: it is cut off, at the turn's limit or the sample's."""
    matched: int | str | None = None
    """The end token or stop string that ended it."""


class Aborted(asyncio.CancelledError):
    """The run needs no more samples for now: the function ends here."""


@dataclass(slots=True)
class Request:
    """A sample that an engine is to continue."""

    sample: Sample
    seed: int
    sampling: SamplingParams
    border: int = field(init=False)
    """Response tokens that are there already."""
    text: str = ""
    """Of the answer."""
    is_withdrawn: bool = False
    """Nobody waits for the answer any more, or the sample is not what was sent."""

    def __post_init__(self) -> None:
        self.border = self.sample.response_length

    def take(self, answer: SampleAnswer, engine: int) -> None:
        """Continues the sample by what the engine of this number has made, if it is as it was."""
        sample = self.sample
        self.is_withdrawn |= sample.response_length != self.border
        if self.is_withdrawn:
            return
        sample.append_model(answer.ids, answer.log_probs, answer.versions, routed_experts=answer.routed_experts)
        sample.finish_reason, sample.matched, self.text = answer.finish_reason, answer.matched, answer.text
        sample.count_drafts(answer.accepted_drafts)
        sample.engine = engine


Send = Callable[[Sequence[Request]], Awaitable[None]]
"""Returns when the samples are continued, or aborted."""


class Moment:
    """What the samples of a group ask for in one moment goes to an engine as one request: it reads their prompt once.
    A request that fails ends the group's tasks."""

    def __init__(self, tasks: asyncio.TaskGroup, send: Send) -> None:
        self._tasks, self._send = tasks, send
        self._waiting: list[Request] = []
        self._answered: asyncio.Future[None]

    async def ask(self, request: Request) -> None:
        """Returns when the sample is continued, or aborted."""
        if not self._waiting:
            self._answered = asyncio.get_running_loop().create_future()
            self._tasks.create_task(self._pass_on(self._answered))
        self._waiting.append(request)
        try:
            await asyncio.shield(self._answered)
        except asyncio.CancelledError:
            request.is_withdrawn = True
            raise

    async def _pass_on(self, answered: asyncio.Future[None]) -> None:
        requests, self._waiting = self._waiting, []
        await self._send(requests)
        answered.set_result(None)


class OwnTime:
    """The time that a function takes besides waiting for engines."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._spent + (0.0 if self._since is None else time.monotonic() - self._since)

    @property
    def is_paused(self) -> bool:
        """Whether it waits for an engine."""
        return self._since is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It waits for an engine."""
        self._spent, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.monotonic()


class TurnEngine:
    """The engines of a run, for one sample."""

    def __init__(
        self,
        sample: Sample,
        seed: int,
        sampling: SamplingParams,
        moment: Moment,
        *,
        max_turns: int | None = None,
        vocab_size: int | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.sample, self.time = sample, OwnTime()
        self.text: str | None = None
        """Of the last turn that was told."""
        self._seed, self._sampling, self._moment, self._codec = seed, sampling, moment, codec
        self._max_turns, self._vocab_size = max_turns, vocab_size
        self._is_first, self._is_over = True, False

    async def generate(self, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()) -> Turn:
        """The model's next turn, from the sample's own tokens: it ends at an end token, at a stop string of the run's
        or of `stop`, after `max_new_tokens` or at a limit of the sample's. Where a limit leaves no room the turn is
        empty, and its finish reason LENGTH. Raises ValueError if the sample is not aligned, RuntimeError if it is asked
        for a turn after the last one, or for two at once."""
        if self.time.is_paused:
            raise RuntimeError("engine.generate is called while it is awaited already")
        sample, border, is_first = self.sample, self.sample.response_length, self._is_first
        if problem := sample.misalignment(self._vocab_size):
            raise ValueError(problem)
        self._is_first = False
        start = sample.turn_start if is_first else border
        if border > start and sample.turn_end is not None:
            sample.finish_reason = sample.turn_end
            return self._turn("")
        longest = self._sampling.max_new_tokens
        if border >= longest or (border == sample.turn_start and sample.turns == self._max_turns):
            return self._end()
        bound = longest if max_new_tokens is None else min(longest, max(start + max_new_tokens, border + 1))
        sampling = replace(self._sampling, max_new_tokens=bound, stop=(*self._sampling.stop, *stop))
        return await self._ask(Request(sample, self._seed, sampling))

    async def _ask(self, request: Request) -> Turn:
        sample = self.sample
        sample.turn_end = None
        with self.time.paused():
            await self._moment.ask(request)
        if request.is_withdrawn:
            raise RuntimeError("the sample was changed while an engine continued it")
        if sample.finish_reason is FinishReason.ABORT:
            raise Aborted
        if self._codec is not None and request.border > sample.turn_start:
            rejoin(sample, request.border, request.sampling.stop, self._codec.decode)
        sample.turn_end = sample.finish_reason
        return self._turn(request.text if request.border == sample.turn_start else "")

    def _turn(self, text: str) -> Turn:
        """The last turn; without a `text` it is decoded."""
        sample = self.sample
        assert sample.finish_reason is not None
        start = sample.turn_start
        if not text and self._codec is not None:
            text = text_of_turn(sample, self._codec.decode)
        self.text = text
        return Turn(
            tuple(sample.response_ids[start:]),
            tuple(sample.rollout_log_probs[start:]),
            text,
            sample.finish_reason,
            sample.matched,
        )

    def _end(self) -> Turn:
        """No room for another turn."""
        if self._is_over:
            raise RuntimeError("it asks for another turn after an empty one of finish reason length: there it must end")
        self._is_over = True
        self.sample.finish_reason, self.sample.matched = FinishReason.LENGTH, None
        return Turn((), (), "", FinishReason.LENGTH)


GenerateFunction = Callable[[Sample, TurnEngine, GenerateSettings], Awaitable[Sample | None]]


async def single_turn(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    """One turn: what is done where no function is given."""
    await engine.generate()
