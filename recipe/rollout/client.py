"""The trainer's side of SGLang's HTTP API: generation with retries and recovery, weights, and memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import aiohttp

from recipe.config import RolloutConfig
from recipe.rollout.answers import read_samples
from recipe.rollout.errors import EngineRefused, EngineUnreachable
from recipe.rollout.prompt_check import check_prompt
from recipe.rollout.sample import SampleGroup
from recipe.rollout.sampling_params import SamplingParams

if TYPE_CHECKING:
    from recipe.rollout.weights_broadcast import Meeting, TensorHeader

Recover = Callable[[str], Awaitable[str]]
"""Replaces the dead engine at a URL by one that holds the current weights; returns the new URL."""

PauseMode = Literal["abort", "retract", "in_place"]
MemoryTag = Literal["kv_cache", "weights", "cuda_graph"]

HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Limits of the client."""

    max_concurrency: int = 256
    """Generation requests in flight at most."""
    request_timeout_s: float = 600.0
    max_retries: int = 3
    """Times a request is sent again after the engine did not answer it."""
    backoff_s: float = 0.2
    """Wait before the first retry; doubles with each."""
    vocab_size: int | None = None
    """Token ids beyond it are refused here, for SGLang ends at one; None: whatever comes is sent."""

    @classmethod
    def of(cls, rollout: RolloutConfig, vocab_size: int) -> Self:
        return cls(
            vocab_size=vocab_size,
            max_concurrency=rollout.rollout_max_concurrency,
            request_timeout_s=rollout.rollout_request_timeout_s,
            max_retries=rollout.rollout_max_retries,
        )


@dataclass(slots=True)
class ClientCounters:
    """What went wrong and was mended, since the client was made."""

    retries: int = 0
    restarts: int = 0


class _Engine:
    """One server, through all its restarts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.load = 0
        """Samples under way."""
        self.restarts = 0
        self.restarting = asyncio.Lock()


class RolloutClient:
    """Speaks to all engines of a run. Use as an asynchronous context manager, in one event loop.

    A request goes to the engine with the fewest samples under way (the first of several). A request that an engine
    did not answer is sent again, at most `max_retries` times; if the engine is dead, `recover` first replaces it.
    Samples are written only from a complete answer, so none is lost or made twice.
    """

    def __init__(
        self, urls: Sequence[str], options: ClientOptions | None = None, recover: Recover | None = None
    ) -> None:
        self.counters = ClientCounters()
        self._options = options or ClientOptions()
        self._engines = [_Engine(url.rstrip("/")) for url in urls]
        self._recover = recover
        self._slots = asyncio.Semaphore(self._options.max_concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._options.request_timeout_s),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def urls(self) -> list[str]:
        """The engines' present addresses."""
        return [engine.url for engine in self._engines]

    async def generate(self, group: SampleGroup, sampling: SamplingParams, seeds: Sequence[int]) -> None:
        """Continues every sample of the group to its end, in one request; `seeds` has one seed a sample.

        Raises EngineRefused if the engine finds the request wrong, EngineUnreachable if it never answers,
        EngineAnswerError if its answer is not SGLang's, UserError for a prompt that no engine may be sent.
        """
        check_prompt(group.prompt, self._options.vocab_size)
        async with self._slots:
            for attempt in range(self._options.max_retries + 1):
                engine = min(self._engines, key=lambda engine: engine.load)
                restarts = engine.restarts
                try:
                    answers = await self._send_group(engine, group, sampling, seeds)
                except EngineUnreachable:
                    if attempt == self._options.max_retries:
                        raise
                    self.counters.retries += 1
                    await self._mend(engine, restarts, self._options.backoff_s * 2**attempt)
                    continue
                results = read_samples(answers, len(group.samples))
                for sample, result in zip(group.samples, results, strict=True):
                    sample.append(result.ids, result.log_probs, result.versions)
                    sample.finish_reason = result.finish_reason
                    sample.response += result.text
                return

    async def abort_all(self) -> None:
        """Ends every request on every engine; each answers with what it has."""
        await self._post_all("/abort_request", {"abort_all": True})

    async def pause_generation(self, mode: PauseMode = "abort") -> None:
        await self._post_all("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        await self._post_all("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forgets cached prefixes. Raises EngineRefused while requests run."""
        await self._post_all("/flush_cache", {})

    async def release_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> None:
        """Gives back the memory of `tags` (default: all) on every idle engine."""
        await self._post_all("/release_memory_occupation", {"tags": tags})

    async def resume_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> None:
        await self._post_all("/resume_memory_occupation", {"tags": tags})

    @asynccontextmanager
    async def weight_update(self) -> AsyncIterator[None]:
        """The session in which SGLang 0.5.19 and later take `update_weights_from_tensor`; older ones know none."""
        try:
            await self._post_all("/begin_weight_update", {})
        except EngineRefused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            yield
            return
        yield
        await self._post_all("/end_weight_update", {})

    async def update_weights_from_tensor(
        self, payloads: Sequence[Sequence[str]], *, load_format: str | None = None, weight_version: str | None = None
    ) -> None:
        """Gives engine i the tensors of `payloads[i]`: a string of `weights_payload.serialize_named_tensors` for each
        tensor-parallel rank. A string can be read once, so nothing is sent twice."""
        bodies = [
            {
                "serialized_named_tensors": list(payload),
                "load_format": load_format,
                "flush_cache": True,
                "weight_version": weight_version,
            }
            for payload in payloads
        ]
        await asyncio.gather(
            *(
                self._post(engine, "/update_weights_from_tensor", body)
                for engine, body in zip(self._engines, bodies, strict=True)
            )
        )

    async def update_weights_from_disk(self, model_path: str, *, weight_version: str) -> None:
        """Every engine reads the Hugging Face checkpoint in `model_path`."""
        body = {"model_path": model_path, "flush_cache": True, "weight_version": weight_version}
        await self._post_all("/update_weights_from_disk", body)

    async def init_weights_update_group(self, meeting: "Meeting", ranks_per_engine: int) -> None:
        """Has every engine join the broadcast group, one after the other behind the trainer, which is rank 0."""
        bodies = [
            {
                "master_address": meeting.address,
                "master_port": meeting.port,
                "rank_offset": 1 + number * ranks_per_engine,
                "world_size": meeting.world_size,
                "group_name": meeting.name,
                "backend": meeting.backend,
            }
            for number in range(len(self._engines))
        ]
        await asyncio.gather(
            *(
                self._post(engine, "/init_weights_update_group", body)
                for engine, body in zip(self._engines, bodies, strict=True)
            )
        )

    async def update_weights_from_distributed(
        self, headers: Sequence["TensorHeader"], group_name: str, *, weight_version: str
    ) -> None:
        """Has every engine receive these tensors, in this order, as one broadcast of their bytes."""
        body = {
            "names": [header.name for header in headers],
            "dtypes": [header.dtype for header in headers],
            "shapes": [list(header.shape) for header in headers],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
            "weight_version": weight_version,
        }
        await self._post_all("/update_weights_from_distributed", body)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._post_all("/destroy_weights_update_group", {"group_name": group_name})

    async def weights_checksums(self) -> list[dict[str, str]]:
        """Checksum by SGLang's name of every tensor, for each engine; of its first GPU, if it has several."""
        answers = await asyncio.gather(
            *(self._post(engine, "/weights_checker", {"action": "checksum"}) for engine in self._engines)
        )
        return [answer["ranks"][0]["checksums"] for answer in answers]

    async def weight_versions(self) -> list[str]:
        """The version of the weights each engine holds."""
        return [str(info["weight_version"]) for info in await self._get_all("/model_info")]

    async def healthy(self) -> list[bool]:
        """Whether each engine answers."""
        return list(await asyncio.gather(*(self._is_healthy(engine) for engine in self._engines)))

    async def _send_group(
        self, engine: _Engine, group: SampleGroup, sampling: SamplingParams, seeds: Sequence[int]
    ) -> object:
        body = {
            "input_ids": [sample.tokens for sample in group.samples],
            "sampling_params": [
                sampling.request(seed, sample.response_length)
                for sample, seed in zip(group.samples, seeds, strict=True)
            ],
            "return_logprob": True,
        }
        engine.load += len(group.samples)
        try:
            return await self._post(engine, "/generate", body)
        finally:
            engine.load -= len(group.samples)

    async def _mend(self, engine: _Engine, restarts: int, backoff_s: float) -> None:
        """After an unanswered request: replaces the engine if it is dead and nobody has, else waits a little."""
        async with engine.restarting:
            if engine.restarts != restarts:
                return
            if self._recover is not None and not await self._is_healthy(engine):
                engine.url = (await self._recover(engine.url)).rstrip("/")
                engine.restarts += 1
                self.counters.restarts += 1
                return
        await asyncio.sleep(backoff_s)

    async def _is_healthy(self, engine: _Engine) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._connected().get(f"{engine.url}/health", timeout=timeout) as response:
                return response.status == HTTPStatus.OK
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _post_all(self, path: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(self._post(engine, path, body) for engine in self._engines))

    async def _get_all(self, path: str) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._request(engine, "GET", path, None) for engine in self._engines)))

    async def _post(self, engine: _Engine, path: str, body: dict[str, Any]) -> Any:
        return await self._request(engine, "POST", path, body)

    async def _request(self, engine: _Engine, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer; None where SGLang answers without one."""
        try:
            async with self._connected().request(method, engine.url + path, json=body) as response:
                if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise EngineUnreachable(f"{engine.url}{path} answered {response.status}")
                if response.status >= HTTPStatus.BAD_REQUEST:
                    raise EngineRefused(engine.url + path, response.status, await response.text())
                return await response.json() if response.content_type == "application/json" else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineUnreachable(f"{engine.url}{path} did not answer: {error or type(error).__name__}") from error

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("RolloutClient is used outside `async with`")
        return self._session
