"""The engine's thread. Requests and commands reach it by a queue; commands are carried out between two batches."""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from recipe.engines.embedded.forward import RowModel
from recipe.engines.embedded.generation import Generation
from recipe.engines.embedded.protocol import RequestError
from recipe.engines.embedded.running_sequence import Request, RunningSequence
from recipe.engines.embedded.weights import WeightTable
from recipe.weight_sync.tensor import NamedTensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
PauseMode = Literal["in_place", "retract"]

GATHER_S = 0.001
"""An idle engine begins when no further request has come for this long,"""
GATHER_DECAY = 0.95
"""times this for every request that has."""


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[], Any]
    result: Future[Any]
    exclusive: bool
    """Waits for the running requests, and new ones wait for it."""


class _Stop:
    """Ends the thread."""


class EmbeddedEngine:
    """Generates. Its methods are for the event loop; what they do is done by the engine's own thread."""

    def __init__(
        self,
        model: RowModel,
        weights: WeightTable,
        *,
        rows: int,
        version: str,
        decode: Callable[[list[int]], str],
        threads: int,
    ) -> None:
        self._weights = weights
        self._threads = threads
        self._inbox: queue.SimpleQueue[Request | _Command | _Stop] = queue.SimpleQueue()
        self._exclusive: list[_Command] = []
        self._requests: dict[RunningSequence, Request] = {}
        self._finished: list[Request] = []
        self._stopped = False
        self._session_open = False
        self._released: set[str] = set()
        self._paused = False
        torch.set_num_threads(threads)
        self._generation = Generation(model, rows, version, decode, self._finish)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the present batch."""
        self._inbox.put(_Stop())
        self._thread.join()

    @property
    def version(self) -> str:
        """The version of the weights."""
        return self._generation.version

    async def generate(self, sequences: list[RunningSequence]) -> None:
        """Returns when all sequences are finished; cancelled, it aborts them."""
        if self._released:
            raise RequestError(f"memory is released ({', '.join(sorted(self._released))}): resume it first")
        request = Request(sequences, asyncio.get_running_loop().create_future())
        self._inbox.put(request)
        try:
            await request.done
        except asyncio.CancelledError:
            self._tell(lambda: self._generation.abort(lambda sequence: sequence in sequences))
            raise

    async def abort(self) -> None:
        """Ends all requests."""
        await self._call(lambda: self._generation.abort(lambda _: True))

    async def flush(self) -> None:
        """Raises RequestError unless the engine is idle; there is no prefix cache to forget."""
        await self._call(self._check_idle)

    async def pause(self, mode: PauseMode) -> None:
        """Between two tokens, until `resume`: requests wait where they are, with their part of the cache (in_place), or
        are read again when they go on (retract). New ones wait too."""

        def pause() -> None:
            self._paused = True
            if mode == "retract":
                self._generation.retract()

        await self._call(pause)

    async def resume(self) -> None:
        """Goes on after `pause`, if there was one."""

        def resume() -> None:
            self._paused = False

        await self._call(resume)

    async def update_weights(self, weights: Iterable[NamedTensor], version: str, *, flush_cache: bool) -> None:
        """Takes weights when the running requests are done, or at once while the engine is paused. Raises WeightError,
        and takes none, if one does not fit; RequestError if the cache of requests that are under way is to be
        flushed."""
        await self._update(lambda: self._weights.replace(weights), version, flush_cache)

    async def load_weights(self, folder: Path, version: str, *, flush_cache: bool) -> None:
        """`update_weights` with those of a checkpoint, which must be complete."""
        await self._update(lambda: self._weights.replace_all(folder), version, flush_cache)

    async def _update(self, replace: Callable[[], None], version: str, flush_cache: bool) -> None:
        def update() -> None:
            if flush_cache:
                self._check_none_running()
            replace()
            self._generation.change_version(version)

        await self._call(update, exclusive=True)

    async def weight_checksums(self) -> dict[str, str]:
        """Checksum of every tensor, by SGLang's name."""
        return await self._call(self._weights.checksums)

    async def open_session(self) -> bool:
        """Opens a weight update of several parts; False if one is open."""
        opened, self._session_open = not self._session_open, True
        return opened

    async def close_session(self) -> bool:
        """False if none is open."""
        closed, self._session_open = self._session_open, False
        return closed

    async def release_memory(self, tags: Iterable[str]) -> None:
        """Frees the cache (the weights stay: without a GPU nobody waits for their memory) and refuses to generate until
        it is resumed. Raises RequestError unless the engine is idle."""

        def release() -> None:
            self._check_idle()
            self._released.update(tags)
            if "kv_cache" in self._released:
                self._generation.free_cache()

        await self._call(release)

    async def resume_memory(self, tags: Iterable[str]) -> None:
        """Raises RequestError for what was not released."""

        def resume() -> None:
            unknown = set(tags) - self._released
            if unknown:
                raise RequestError(f"{', '.join(sorted(unknown))} was not released")
            self._released.difference_update(tags)

        await self._call(resume)

    async def generates(self) -> bool:
        """Whether it can: answered by the thread that does, between two batches."""
        return await self._call(lambda: not (self._released or self._paused))

    async def _call(self, run: Callable[[], T], *, exclusive: bool = False) -> T:
        return await asyncio.wrap_future(self._tell(run, exclusive=exclusive))

    def _tell(self, run: Callable[[], T], *, exclusive: bool = False) -> "Future[T]":
        result: Future[T] = Future()
        self._inbox.put(_Command(run, result, exclusive))
        return result

    # From here on everything runs in the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while not self._stopped:
                self._read_inbox()
                if self._paused or not self._generation.running:
                    self._run_exclusive()
                if not self._paused:
                    self._advance()
                self._resolve()
        except BaseException:
            logger.exception("the engine's thread failed; the server ends")
            os._exit(1)

    def _advance(self) -> None:
        if self._generation.waiting and not self._exclusive:
            self._generation.admit()
        if self._generation.running:
            self._generation.decode()

    def _read_inbox(self) -> None:
        """Takes what has come; an idle engine waits for something, and a little longer for its company."""
        patience = 0.0
        if self._paused or not (self._generation.running or self._generation.waiting or self._exclusive):
            self._take(self._inbox.get())
            patience = GATHER_S
        while not self._stopped:
            try:
                self._take(self._inbox.get(block=patience > 0, timeout=patience))
            except queue.Empty:
                return
            patience *= GATHER_DECAY

    def _take(self, message: Request | _Command | _Stop) -> None:
        match message:
            case Request():
                self._requests.update(dict.fromkeys(message.sequences, message))
                self._generation.waiting.extend(message.sequences)
            case _Command(exclusive=True):
                self._exclusive.append(message)
            case _Command():
                _carry_out(message)
            case _Stop():
                self._stopped = True

    def _run_exclusive(self) -> None:
        for command in self._exclusive:
            _carry_out(command)
        self._exclusive.clear()

    def _check_none_running(self) -> None:
        if self._generation.running:
            raise RequestError(
                f"the cache of {self._generation.running} running requests cannot be flushed: pause by retract"
            )

    def _check_idle(self) -> None:
        running, waiting = self._generation.running, len(self._generation.waiting)
        if running or (waiting and not self._paused):
            raise RequestError(
                f"there are {running} running and {waiting} waiting requests; abort or finish them first"
            )

    def _finish(self, sequence: RunningSequence) -> None:
        request = self._requests.pop(sequence)
        request.pending -= 1
        if not request.pending:
            self._finished.append(request)

    def _resolve(self) -> None:
        """Tells the event loop which requests are done, all at once."""
        if self._finished:
            finished, self._finished = self._finished, []
            finished[0].done.get_loop().call_soon_threadsafe(_set_done, finished)


def _carry_out(command: _Command) -> None:
    """Runs a command. A refusal is told without its traceback, which would keep the tensors of an update alive."""
    if not command.result.set_running_or_notify_cancel():
        return
    try:
        command.result.set_result(command.run())
    except ValueError as refusal:
        command.result.set_exception(refusal.with_traceback(None))


def _set_done(requests: list[Request]) -> None:
    for request in requests:
        if not request.done.done():
            request.done.set_result(None)
