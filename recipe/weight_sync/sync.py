"""From the trainer's weights to the engines, in buckets: the whole model is never held a second time."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch

from recipe.config import Architecture, Config
from recipe.config.groups_rollout import InFlight
from recipe.config.sglang_rules import ONE_GPU, EngineLayout
from recipe.sampling.errors import EngineUnreachable
from recipe.system.errors import UserError
from recipe.weight_sync.broadcast import BroadcastGroup, TensorHeader, UpdateGroup, open_group_store
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.client import WeightsClient
from recipe.weight_sync.relay import Relay
from recipe.weight_sync.result import UpdateResult
from recipe.weight_sync.tensor import Bucket, NamedTensor

T = TypeVar("T")

FUSED_ON_LOADING = (".self_attn.q_a_proj.weight", ".self_attn.kv_a_proj_with_mqa.weight")
NEWS_OF_FAILURE_S = 5.0
"""Time in which it shows which member of a broadcast failed, when another one has noticed."""
_SHOWN = 3
"""Tensors that differ are named up to this number."""

Request = Callable[[WeightsClient], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class WeightSync:
    """How weights reach the engines."""

    transfer: Literal["tensor", "distributed", "disk"]
    bucket_bytes: int
    ranks_per_engine: int
    address: str
    """This machine's address, for the engines that join a broadcast."""
    checksums: Callable[[], ExpectedChecksums] | None = None
    """Checksums of what is sent, to compare with what the engines hold; None: they are not compared."""
    timeout_s: float = 120.0
    """An engine that has not taken a bucket by then has failed."""
    disk_timeout_s: float = 600.0
    """Time that an engine may take to read a whole checkpoint from the disk."""
    in_flight: InFlight | None = None
    """What becomes of the cache of requests that are under way; None: there are none. Engines are told to stand still;
    whoever has the weights sent lets them go on."""
    pause_timeout_s: float = 30.0
    """An engine that does not answer by then that it stands still has failed: the others do so too meanwhile."""

    @classmethod
    def of(cls, config: Config, architecture: Architecture, address: str) -> Self:
        rollout, cluster = config.rollout, config.cluster
        own_gpus = not cluster.colocate and cluster.device != "cpu" and torch.cuda.is_available()

        layout = EngineLayout.of(config)

        def checksums() -> ExpectedChecksums:
            is_embedded = rollout.engine == "embedded"
            return ExpectedChecksums(
                architecture.num_hidden_layers,
                architecture.n_routed_experts,
                ONE_GPU if is_embedded else layout,
                as_float32=is_embedded,
            )

        return cls(
            transfer=rollout.update_weight_transfer or ("distributed" if own_gpus else "tensor"),
            bucket_bytes=rollout.update_weight_buffer_size,
            ranks_per_engine=layout.tp * layout.pp,
            address=address,
            checksums=checksums if rollout.check_weight_update_equal else None,
            timeout_s=rollout.update_weight_timeout,
            disk_timeout_s=rollout.rollout_engine_start_timeout_s,
            in_flight=rollout.update_weight_in_flight,
            pause_timeout_s=rollout.rollout_health_check_timeout,
        )

    def send(
        self, weights: Iterable[NamedTensor], engines: Mapping[int, str], version: str, relay: Relay | None = None
    ) -> UpdateResult:
        """Sends all tensors to the engines, whose addresses are given by number; after the last bucket they hold
        `version`. Engines that open the memory of several ranks get them by `relay`, which also serves engines that
        another rank speaks to. `weights`, a collective of the trainer's ranks, is exhausted also when engines fail or
        refuse."""
        if not engines and (relay is None or not relay.is_open):
            for _ in weights:
                pass
            return UpdateResult()
        checksums = self.checksums() if self.checksums is not None and engines else None
        counted = _Counted(checksums.watch(weights) if checksums is not None else weights)
        passing = iter(counted)
        with self._receivers(engines, self.timeout_s) as receivers:
            paused_at = time.monotonic()
            receivers.ask(self._pause)
            receivers.ask(WeightsClient.begin_weight_update)
            began, whole = time.monotonic(), True
            if self.transfer == "distributed":
                whole = self._broadcast(receivers, passing, version)
            else:
                self._hand_over(receivers, passing, version, relay)
            rate = counted.nbytes / (time.monotonic() - began) if engines else None
            receivers.ask(WeightsClient.end_weight_update)
            for _ in passing:
                pass
            if whole and checksums is not None:
                receivers.ask(lambda engine: _compare(engine, checksums, version))
            paused_s = self._seconds_since(paused_at) if engines else None
            return replace(receivers.result(whole=whole), bytes_per_second=rate, paused_s=paused_s)

    def load_from_disk(self, folder: Path, engines: Mapping[int, str], version: str) -> UpdateResult:
        """Has every engine read the Hugging Face checkpoint in `folder`, as `version`."""
        with self._receivers(engines, self.disk_timeout_s) as receivers:
            paused_at = time.monotonic()
            receivers.ask(self._pause)
            receivers.ask(lambda engine: engine.update_weights_from_disk(str(folder), weight_version=version))
            return replace(receivers.result(), paused_s=self._seconds_since(paused_at))

    def _receivers(self, engines: Mapping[int, str], timeout_s: float) -> "_Receivers":
        return _Receivers(WeightsClient(number, url, timeout_s, self.in_flight) for number, url in engines.items())

    async def _pause(self, engine: WeightsClient) -> None:
        await engine.pause_generation(self.pause_timeout_s)

    def _seconds_since(self, paused_at: float) -> float | None:
        return None if self.in_flight is None else time.monotonic() - paused_at

    def _hand_over(
        self, receivers: "_Receivers", weights: Iterator[NamedTensor], version: str, relay: Relay | None
    ) -> None:
        """By handles of the trainer's own memory. While the engines load a bucket, the next one is gathered."""

        def settle(loading: Future[None]) -> None:
            loading.result()
            if relay is not None:
                relay.settle([engine.number for engine in receivers.present])

        loading: Future[None] | None = None
        for bucket in map(Bucket.of, buckets(weights, self.bucket_bytes)):
            if loading is not None:
                settle(loading)
            if not receivers.present and (relay is None or not relay.is_open):
                return
            relayed = relay.exchange(bucket) if relay is not None else {}
            loading = receivers.begin(
                lambda engine, bucket=bucket, relayed=relayed: engine.update_weights_from_tensor(  # type: ignore[misc]
                    relayed.get(engine.number) or [bucket.payload() for _ in range(self.ranks_per_engine)],
                    weight_version=version,
                )
            )
        if loading is not None:
            settle(loading)

    def _broadcast(self, receivers: "_Receivers", weights: Iterator[NamedTensor], version: str) -> bool:
        """Forms a group with the engines, sends them one bucket after the other, and ends it. Whether they got all: a
        group in which one fails is lost for the others too."""
        if not receivers.present:
            return False
        port, store = open_group_store(self.address)
        members = 1 + self.ranks_per_engine * len(receivers.present)
        ranks = {engine: 1 + number * self.ranks_per_engine for number, engine in enumerate(receivers.present)}
        pending = buckets(weights, self.bucket_bytes)
        bucket = next(pending)
        backend = "nccl" if bucket[0][1].is_cuda else "gloo"
        update_group = UpdateGroup(self.address, port, f"weights-{port}", members, backend)
        try:
            group = receivers.together(
                lambda engine: engine.init_weights_update_group(update_group, ranks[engine]),
                lambda: BroadcastGroup(update_group, 0, store),
            )
            while True:
                headers = [TensorHeader.of(name, tensor) for name, tensor in bucket]
                receivers.together(
                    lambda engine, headers=headers: engine.update_weights_from_distributed(  # type: ignore[misc]
                        headers, update_group.name, weight_version=version
                    ),
                    lambda bucket=bucket: group.send(bucket),  # type: ignore[misc]
                )
                if (following := next(pending, None)) is None:
                    break
                bucket = following
            receivers.together(lambda engine: engine.destroy_weights_update_group(update_group.name), group.leave)
        except _GroupLost:
            return False
        return True


class _Counted:
    """The weights, and the bytes of those that have passed."""

    def __init__(self, weights: Iterable[NamedTensor]) -> None:
        self._weights = weights
        self.nbytes = 0

    def __iter__(self) -> Iterator[NamedTensor]:
        for name, tensor in self._weights:
            self.nbytes += tensor.nbytes
            yield name, tensor


class _GroupLost(Exception):
    """An engine has failed or refused in a collective operation with the others."""


class _Receivers:
    """The engines that take an update, spoken to from a thread of its own. One that does not answer, or refuses, is
    left out from then on."""

    def __init__(self, engines: Iterable[WeightsClient]) -> None:
        self.present = list(engines)
        self._failed: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._stack = AsyncExitStack()
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="weight update", daemon=True).start()

        async def connect() -> None:
            for engine in self.present:
                await self._stack.enter_async_context(engine)

        self._begin(connect()).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begin(self._stack.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def result(self, *, whole: bool = True) -> UpdateResult:
        """What has become of them."""
        incomplete = () if whole else tuple(engine.number for engine in self.present)
        return UpdateResult(self._failed, incomplete, self._refused)

    def begin(self, request: Request) -> Future[None]:
        """Asks each, and returns at once. The result comes when all have answered."""

        async def one(engine: WeightsClient) -> None:
            try:
                await self._ask(engine, request)
            except EngineUnreachable:
                pass  # it is left out
            except UserError as error:
                self._leave_out(engine, self._refused, error)

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, tuple(self.present)))

        return self._begin(all_of_them())

    def ask(self, request: Request) -> None:
        """Asks each, and waits for all."""
        self.begin(request).result()

    def together(self, request: Request, ours: Callable[[], T]) -> T:
        """Carries out both sides of a collective operation; `ours` blocks, in a thread of its own. Raises _GroupLost as
        soon as one engine fails or, not having lost a peer, refuses; nobody waits for the thread then."""
        return self._begin(self._together(request, ours)).result()

    async def _together(self, request: Request, ours: Callable[[], T]) -> T:
        asked = list(self.present)
        theirs = [asyncio.create_task(self._ask(engine, request)) for engine in asked]
        mine = asyncio.wrap_future(_in_thread(ours))
        mine.add_done_callback(lambda one: one.cancelled() or one.exception())
        both: set[asyncio.Future[Any]] = {mine, *theirs}
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        if not self._failed and any(one.exception() for one in done):
            # Who lost a peer fails too, and may say so first.
            await asyncio.wait(theirs, timeout=NEWS_OF_FAILURE_S)
        for one in theirs:
            one.cancel()
        answers = await asyncio.gather(*theirs, return_exceptions=True)
        if not self._failed:
            for engine, answer in zip(asked, answers, strict=True):
                if isinstance(answer, UserError):
                    self._leave_out(engine, self._refused, answer)
        if self._failed or self._refused:
            raise _GroupLost
        return await mine

    async def _ask(self, engine: WeightsClient, request: Request) -> None:
        try:
            await request(engine)
        except EngineUnreachable as error:
            self._leave_out(engine, self._failed, error)
            raise

    def _leave_out(self, engine: WeightsClient, among: dict[int, str], error: UserError) -> None:
        self.present.remove(engine)
        among[engine.number] = str(error)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def buckets(weights: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Consecutive tensors whose bytes add up to at most `limit` (or a single larger one). Only where SGLang fuses two
    tensors as it loads them, and drops without a word what comes without its partner, a bucket waits for both."""
    pending: list[NamedTensor] = []
    size = 0
    lonely: set[str] = set()
    for name, tensor in weights:
        if pending and not lonely and size + tensor.nbytes > limit:
            yield pending
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
        if name.endswith(FUSED_ON_LOADING):
            lonely ^= {name.rpartition(".self_attn.")[0]}
    if pending:
        yield pending


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """The result of `work`, which a thread carries out that nobody has to wait for."""
    result: Future[T] = Future()

    def carry_out() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=carry_out, name="weight broadcast", daemon=True).start()
    return result


async def _compare(engine: WeightsClient, checksums: ExpectedChecksums, version: str) -> None:
    found = checksums.compare(await engine.checksums())
    if found.differing:
        raise UserError(
            f"after the update to version {version}, {len(found.differing)} of {found.compared} tensors of engine "
            f"{engine.number} are not the trainer's, the first of them {', '.join(found.differing[:_SHOWN])}: samples "
            "would come from other weights than those that are trained; see the engine's log"
        )
