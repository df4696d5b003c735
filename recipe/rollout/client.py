"""Generation by all engines of a run: with retries, and reports of engines that do not generate any more."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import aiohttp

from recipe.config import RolloutConfig
from recipe.data.prompts import Prompt
from recipe.generation.custom_generate import Generation, GroupRun
from recipe.generation.turns import Request
from recipe.rollout.deadlines import Deadlines
from recipe.rollout.fleet import EnginePeer, Fleet, HealthOptions, OnSilent
from recipe.run.conditions import Course
from recipe.sampling.errors import EngineUnreachable, StaleWeights, first_failure
from recipe.sampling.http import LARGEST_BODY, ask, generates, open_session
from recipe.sampling.routing import RouterShape
from recipe.sampling.sample import FinishReason, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.sampling.sglang_response import SampleAnswer, read_samples
from recipe.system.errors import UserError

HEALTH_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 600.0
LARGEST_ROUTED_BODY = 4 << 30
"""Bytes of an answer at most that tells the experts of every token, 1,000 bytes of it for 47 layers of 4."""
ABORT_AGAIN_S = 0.5
"""An abort may reach an engine before a request that was sent first."""


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What the client asks for, and its limits."""

    max_concurrency: int = 256
    """Generation requests in flight at most."""
    request_timeout_s: float | None = None
    """Longest time for an answer; None: as long as it takes."""
    max_retries: int = 3
    """Times a request is sent again after the engine did not answer it."""
    backoff_s: float = 0.2
    """Wait before the first retry; doubles with each."""
    health: HealthOptions = field(default_factory=HealthOptions)
    vocab_size: int | None = None
    """Token ids beyond it are refused here, for SGLang ends at one; None: whatever comes is sent."""
    routers: RouterShape | None = None
    """Of the model, whose engines are asked where they took the tokens of rollouts; None: they are not."""
    generation: Generation = field(default_factory=Generation)
    """How samples are generated."""
    keeps_cache: bool = False
    """Whether engines keep their cache when they take weights: what it has of older ones is then not found again."""

    @classmethod
    def of(
        cls,
        rollout: RolloutConfig,
        vocab_size: int,
        routers: RouterShape | None = None,
        generation: Generation | None = None,
    ) -> Self:
        return cls(
            generation=generation or Generation(),
            vocab_size=vocab_size,
            routers=routers,
            max_concurrency=rollout.rollout_max_concurrency,
            request_timeout_s=rollout.rollout_request_timeout_s,
            max_retries=rollout.rollout_max_retries,
            health=HealthOptions.of(rollout),
            keeps_cache=rollout.update_weight_in_flight == "keep",
        )


@dataclass(frozen=True, slots=True)
class ClientCounters:
    """What went wrong and was mended, since the client was made."""

    retries: int = 0
    """Requests that were sent again."""
    restarts: int = 0
    """Engines that were replaced."""
    retried_tokens: int = 0
    """Tokens of the answers to requests that were sent again: at most so many were made twice."""
    failed_samples: int = 0
    """At which the custom generate function failed, and which were left out."""

    def __sub__(self, before: "ClientCounters") -> "ClientCounters":
        """What has happened since they were `before`."""
        return ClientCounters(
            self.retries - before.retries,
            self.restarts - before.restarts,
            self.retried_tokens - before.retried_tokens,
            self.failed_samples - before.failed_samples,
        )


class RolloutClient:
    """Speaks to all engines of a run. Use as an asynchronous context manager, in one event loop.

    A request goes to the engine with the fewest samples under way (the first of several). A request that an engine
    did not answer is sent again, at most `max_retries` times, to another engine if there is one; an engine that is dead
    or, while the engines are `watched`, hangs is reported, and spoken to again where it has been started anew. Samples
    are written only from a complete answer, so none is lost or made twice.
    """

    def __init__(
        self,
        urls: Sequence[str],
        options: ClientOptions | None = None,
        on_silent: OnSilent | None = None,
        on_answer: Callable[[int], None] | None = None,
    ) -> None:
        """`urls`: the engines' addresses, in the order of their numbers; `on_answer` is called whenever an engine has
        made samples, with its number."""
        self._on_answer = on_answer
        self._options = options or ClientOptions()
        self._fleet = Fleet(urls, self._is_healthy, on_silent, self._options.health)
        self._engines = self._fleet.engines
        self._draining = False
        self._deadlines = Deadlines()
        self._version = ""
        """Of the weights that all engines have taken."""
        self._runs: set[GroupRun] = set()
        self._idle = asyncio.Event()
        self._retries = 0
        self._retried_tokens = self._failed_samples = 0
        self.last_failure = ""
        """Of the custom generate function."""
        self.course = Course()
        """Of samples under way."""
        self._slots = asyncio.Semaphore(self._options.max_concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = open_session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._fleet.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def counters(self) -> ClientCounters:
        """Since the client was made."""
        restarts = sum(engine.restarts for engine in self._engines)
        return ClientCounters(self._retries, restarts, self._retried_tokens, self._failed_samples)

    def move(self, urls: Sequence[str]) -> None:
        """Takes note of engines that somebody else has replaced meanwhile: `urls` are the addresses of all."""
        for engine, url in zip(self._engines, urls, strict=True):
            if engine.url != url.rstrip("/"):
                engine.move(url)

    @asynccontextmanager
    async def updating(self, version: str) -> AsyncIterator[None]:
        """Weights of this version go to all engines, which may stand still meanwhile: none is taken for dead, and no
        request's time runs. Raises what a replacement under way before it failed with."""
        async with self._fleet.updating():
            self._deadlines.stop()
            try:
                yield
            finally:
                self._deadlines.go_on()
        self._version = version

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.TaskGroup]:
        """Tasks that generate, while every engine is watched. The block is left when all are done and every engine is
        there; the first failure, also of a replacement, ends the others and is raised."""
        try:
            async with asyncio.TaskGroup() as outer:
                watch = outer.create_task(self._fleet.watch())
                async with asyncio.TaskGroup() as tasks:
                    yield tasks
                await self._fleet.settle()
                watch.cancel()
        except ExceptionGroup as failures:
            raise first_failure(failures) from None

    async def generate(
        self, group: SampleGroup, sampling: SamplingParams, seeds: Sequence[int], *, routed: bool = False
    ) -> None:
        """Continues every unfinished sample of the group to its end, by the function of the options; `seeds` has one
        seed a sample. While the client is drained they may also be aborted, with or without new tokens. `routed`: the
        engine is asked where it takes them, if the `routers` of the options are known.

        Raises EngineRefused if the engine finds a request wrong, EngineUnreachable if it never answers,
        EngineAnswerError if its answer is not SGLang's, StaleWeights if it has missed an update, UserError for a prompt
        that no engine may be sent, or where a failure of the function is to end the run.
        """
        check_prompt(group.prompt, self._options.vocab_size)
        todo = [pair for pair in zip(group.samples, seeds, strict=True) if not pair[0].is_finished]
        routers = self._options.routers if routed else None
        if not todo:
            return
        of_failed = ExitStack()
        send = partial(self._continue, routers=routers, of_failed=of_failed)
        run = GroupRun(todo, sampling, self._options.generation, send)
        self._runs.add(run)
        self._idle.clear()
        try:
            with of_failed:
                failures = await run.complete()
            self._failed_samples += len(failures)
            self.last_failure = failures[-1] if failures else self.last_failure
        finally:
            self._runs.discard(run)
            if not self._runs:
                self._idle.set()

    async def _continue(self, todo: Sequence[Request], routers: RouterShape | None, of_failed: ExitStack) -> None:
        """The slot of a request that fails is free when whoever asked for the samples is told, and may end the rest."""
        await self._slots.acquire()
        try:
            await self._generate(todo, routers)
        except BaseException:
            of_failed.callback(self._slots.release)
            raise
        self._slots.release()

    async def _generate(self, todo: Sequence[Request], routers: RouterShape | None) -> None:
        for attempt in range(self._options.max_retries + 1):
            engine = await self._fleet.least_loaded()
            restarts = engine.restarts
            if self._draining:
                break
            version = self._version
            try:
                answers = await self._send(engine, todo, routed=routers is not None)
            except EngineUnreachable as error:
                if self._draining:
                    break
                if attempt == self._options.max_retries:
                    raise EngineUnreachable(f"engine {engine.number} at {error}") from error
                self._retries += 1
                if await self._fleet.examine(engine, restarts):
                    await asyncio.sleep(self._options.backoff_s * 2**attempt)
                continue
            lengths = [len(request.sample.prompt_ids) + request.border for request in todo]
            results = read_samples(answers, lengths, self._options.vocab_size, routers)
            check_newest(engine.number, results, version)
            if self._on_answer is not None:
                self._on_answer(engine.number)
            for request, result in zip(todo, results, strict=True):
                request.take(result, engine.number)
                self._retried_tokens += len(result.ids) if attempt else 0
            return
        for request in todo:
            if not request.is_withdrawn:
                request.sample.finish_reason = FinishReason.ABORT

    async def drain(self) -> None:
        """Aborts what is under way, and what waits for its turn. Returns when every `generate` has what its engine
        made of it."""
        self._draining = True
        try:
            while self._runs:
                for run in self._runs:
                    run.abort()
                await asyncio.gather(*(self._abort(engine) for engine in self._engines))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), ABORT_AGAIN_S)
        finally:
            self._draining = False

    async def _abort(self, engine: EnginePeer) -> None:
        if engine.replacement is None:
            with suppress(EngineUnreachable):
                await engine.answer(self._post(engine, "/abort_request", {"abort_all": True}, ABORT_TIMEOUT_S))

    async def healthy(self) -> list[bool]:
        """Whether each engine answers."""
        return list(await asyncio.gather(*(self._is_healthy(engine) for engine in self._engines)))

    async def _send(self, engine: EnginePeer, todo: Sequence[Request], *, routed: bool) -> object:
        body: dict[str, Any] = {
            "input_ids": [request.sample.tokens for request in todo],
            "sampling_params": [request.sampling.request(request.seed, request.border) for request in todo],
            "return_logprob": True,
        }
        if routed:
            body["return_routed_experts"] = True
        if self._options.keeps_cache:
            body["extra_key"] = self._version
        engine.load += len(todo)
        self.course.change(len(todo))
        try:
            return await engine.answer(self._samples(engine, body, LARGEST_ROUTED_BODY if routed else LARGEST_BODY))
        finally:
            engine.load -= len(todo)
            self.course.change(-len(todo))

    async def _samples(self, engine: EnginePeer, body: dict[str, Any], largest: int) -> Any:
        try:
            async with self._deadlines.within(self._options.request_timeout_s):
                return await self._post(engine, "/generate", body, None, largest)
        except TimeoutError:
            raise EngineUnreachable(f"{engine.url}/generate did not answer in time") from None

    async def _is_healthy(self, engine: EnginePeer, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
        return await generates(self._connected(), engine.url, timeout_s)

    async def _post(
        self,
        engine: EnginePeer,
        path: str,
        body: dict[str, Any],
        timeout_s: float | None,
        largest: int = LARGEST_BODY,
    ) -> Any:
        return await ask(self._connected(), "POST", engine.url + path, body, timeout_s=timeout_s, largest=largest)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("RolloutClient is used outside `async with`")
        return self._session


def check_newest(number: int, results: Sequence[SampleAnswer], version: str) -> None:
    """Raises StaleWeights if engine `number` made a token under older weights than those of `version`, which all had
    taken when it was asked ("": none). It may have newer ones, which came meanwhile or when it was started again."""
    made_under = {made_under for result in results for made_under in result.versions}
    older = {one for one in made_under if version and not (one.isdecimal() and int(one) >= int(version))}
    if older:
        raise StaleWeights(
            f"engine {number} answered under weight version {', '.join(sorted(older))} to a request that it was sent "
            f"after all engines had taken version {version}: it missed a weight update"
        )


def check_prompt(prompt: Prompt, vocab_size: int | None) -> None:
    """Raises UserError for a prompt that SGLang does not refuse, but ends at: one that is empty, or has a token id
    outside the vocabulary (None: of any size)."""
    if not prompt.ids:
        raise UserError(f"prompt {prompt.index} has no tokens: take it out of the prompt file")
    for token in (min(prompt.ids), max(prompt.ids)):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise UserError(
                f"prompt {prompt.index} has the token id {token}, outside the model's vocabulary of {vocab_size}: the "
                "tokenizer is not the model's; check that --hf-checkpoint has both from one source"
            )
