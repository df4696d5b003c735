"""The rollout servers: an actor owns each one's process and replaces it when it dies."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle

from recipe.cluster.calls import get
from recipe.cluster.placement import Placement, own_address
from recipe.cluster.trainer import TrainerGroup
from recipe.config import Config, Resolved
from recipe.errors import UserError
from recipe.rollout.servers.launch import Launch, SglangServer, launch_embedded, launch_sglang
from recipe.rollout.servers.process import EngineProcess
from recipe.rollout.weights_sync import Delivery
from recipe.seeds import derive

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Times that a dead engine is started before the run gives up."""

WEIGHTS, THE_REST = ("weights",), ("kv_cache", "cuda_graph")
"""The memory that an engine takes again before it is sent weights, and after it."""

INITIAL_VERSION = "initial"
"""Of the weights that an engine starts with, before the trainer has sent any."""


def threads_of_engine(config: Config) -> int:
    """CPU threads of an engine without a GPU: as configured, or the machine's cores shared by the engines."""
    if config.cluster.num_cpus_per_engine is not None:
        return max(1, int(config.cluster.num_cpus_per_engine))
    return max(1, len(os.sched_getaffinity(0)) // config.num_engines)


def start_again(name: str, start: Callable[[], str]) -> str:
    """The address of an engine that died, from `start`, which is tried START_ATTEMPTS times. Raises UserError, with the
    end of the engine's log, if it never works."""
    for attempt in range(1, START_ATTEMPTS):
        try:
            return start()
        except UserError as error:
            logger.warning("%s does not start (attempt %d of %d): %s", name, attempt, START_ATTEMPTS, error)
    try:
        return start()
    except UserError as error:
        raise UserError(f"{name} died and could not be started again in {START_ATTEMPTS} attempts: {error}") from error


def deliver(
    numbers: Sequence[int],
    send: Callable[[Sequence[int]], Delivery],
    urls: Sequence[str],
    start_again: Callable[[int], None],
) -> None:
    """Sends weights by `send` to engines `numbers`, of which those that fail over it are started again, which changes
    `urls`, and get them again with those that have not got all. Raises UserError if that goes on for START_ATTEMPTS."""
    if not numbers:
        return
    for _ in range(START_ATTEMPTS):
        delivery = send(numbers)
        if not delivery.failed:
            return
        failed = [number for number in numbers if urls[number] in delivery.failed]
        incomplete = [number for number in numbers if urls[number] in delivery.incomplete]
        reasons = [delivery.failed[urls[number]] for number in failed]
        for number, reason in zip(failed, reasons, strict=True):
            logger.warning("engine %d failed while it was sent weights (%s): it is started again", number, reason)
            start_again(number)
        numbers = sorted([*failed, *incomplete])
    raise UserError(
        f"engine {failed[0]} failed in {START_ATTEMPTS} attempts to send it the weights, the last time since "
        f"{reasons[0]}; see its log"
    )


class EngineActor:
    """Owns one server process, which dies with this one."""

    def __init__(self, resolved: Resolved, number: int, gpus: Sequence[int]) -> None:
        """`gpus`: the numbers of its GPUs on its machine, if it has any."""
        self.resolved, self.number, self.gpus = resolved, number, gpus
        self.process: EngineProcess | None = None
        self.starts = 0
        self.released: set[str] = set()
        """What memory the server has given back, by SGLang's tags."""

    def start(self) -> str:
        """Starts the server, killing the one before it, and returns its address once it is healthy."""
        if self.process is not None:
            self.process.kill()
        self.starts += 1
        self.released.clear()
        logs = self.resolved.config.run_dir.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"engine-{self.number}.{self.starts}.log"
        self.process = EngineProcess(self._launch(), log, host=own_address(self.resolved.config))
        self.process.wait_healthy(self.resolved.config.rollout.rollout_engine_start_timeout_s)
        return self.process.url

    def keep_alive(self) -> str:
        """Starts the server again if it has died or does not generate, which it cannot be asked for while its memory is
        released. Returns its address. Raises UserError if that fails for good."""
        timeout_s = self.resolved.config.rollout.rollout_health_check_timeout
        if self.process is not None:
            asks = self.process.answers if self.released else self.process.generates
            if asks(timeout_s):
                return self.process.url
        logger.warning("engine %d does not generate any more: it is started again", self.number)
        return start_again(f"engine {self.number}", self.start)

    def release_memory(self) -> None:
        """Has the server give back all its memory. One that does not is ended: it is in the trainer's way."""
        assert self.process is not None
        tags = (*WEIGHTS, *THE_REST)
        if self.process.release_memory(tags, self.resolved.config.rollout.update_weight_timeout):
            self.released.update(tags)
        elif self.process.alive:
            logger.warning("engine %d does not give its memory back: it is ended", self.number)
            self.process.kill()

    def resume_memory(self, tags: Sequence[str]) -> str:
        """Has the server take memory again that it gave back; one that fails over it is started again, and holds no
        trained weights then. Returns its address. Raises UserError if that fails for good."""
        assert self.process is not None
        again = [tag for tag in tags if tag in self.released]
        if not again:
            return self.process.url
        if self.process.resume_memory(again, self.resolved.config.rollout.update_weight_timeout):
            self.released.difference_update(again)
            return self.process.url
        logger.warning("engine %d does not take its memory again: it is started again", self.number)
        return start_again(f"engine {self.number}", self.start)

    def _launch(self) -> Launch:
        config = self.resolved.config
        model, seed = config.model.hf_checkpoint.resolve(), derive(config.misc.seed, "engine", self.number) % 2**31
        if config.rollout.engine == "sglang":
            return launch_sglang(
                model,
                SglangServer.of(config, self.gpus),
                weight_version=INITIAL_VERSION,
                threads=threads_of_engine(config),
                context_length=self.resolved.max_context_len,
                random_seed=seed,
            )
        return launch_embedded(
            model,
            weight_version=INITIAL_VERSION,
            threads=threads_of_engine(config),
            context_length=self.resolved.max_context_len,
            random_seed=seed,
        )

    def stop(self) -> None:
        """Ends the server."""
        if self.process is not None:
            self.process.stop()
            self.process = None


class EngineGroup:
    """All engines of a run. Use as a context manager: leaving it ends them."""

    def __init__(self, resolved: Resolved, placement: Placement) -> None:
        actor: Any = ray.remote(EngineActor)
        self._actors: list[ActorHandle] = [
            actor.options(name=f"engine {number}", **placement.for_engine(number)).remote(
                resolved, number, placement.gpus_of_engine(number)
            )
            for number in range(resolved.config.num_engines)
        ]
        self._shares_gpus = resolved.config.cluster.colocate
        self._starting: list[ray.ObjectRef] = []
        self._urls: list[str] = []
        self._weights: tuple[TrainerGroup, str] | None = None
        self._sending = asyncio.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.wait([actor.stop.remote() for actor in self._actors], num_returns=len(self._actors), timeout=30)

    def begin_start(self) -> None:
        """Lets the engines start, without waiting for them."""
        self._starting = [actor.start.remote() for actor in self._actors]

    def finish_start(self) -> list[str]:
        """Waits for `begin_start`. Returns the engines' addresses. Raises UserError if one does not become healthy."""
        self._urls = get(self._starting, self._names)
        return list(self._urls)

    def release_memory(self) -> None:
        """Has idle engines that share the trainer's GPUs give back their memory; `update_weights` has them take it
        again."""
        if self._shares_gpus:
            get([actor.release_memory.remote() for actor in self._actors], self._names)

    def replace_dead(self) -> list[str]:
        """Starts engines again that have died or hang, for a time in which nothing is generated: they hold no trained
        weights then. Returns the addresses of all. Raises UserError if one does not become healthy."""
        self._urls = get([actor.keep_alive.remote() for actor in self._actors], self._names)
        return list(self._urls)

    def update_weights(self, trainer: TrainerGroup, version: int) -> list[str]:
        """Sends the policy to every engine; one that fails over it is started again. Returns the addresses of all."""
        self._weights = trainer, str(version)
        self._resume_memory(WEIGHTS)
        self._deliver(range(len(self._urls)))
        self._deliver(self._resume_memory(THE_REST))
        return list(self._urls)

    def _resume_memory(self, tags: Sequence[str]) -> list[int]:
        """The numbers of the engines that had to be started again for it."""
        if not self._shares_gpus:
            return []
        before = self._urls
        self._urls = get([actor.resume_memory.remote(tags) for actor in self._actors], self._names)
        return [number for number, url in enumerate(before) if url != self._urls[number]]

    async def recover(self, url: str) -> str:
        """Replaces the engine at `url` by a new one that holds the current weights, which the trainer still has: it
        does nothing else while something is generated. Returns the new address. Raises UserError if that fails."""
        number = self._urls.index(url)
        logger.warning("engine %d at %s does not generate any more: it is started again", number, url)
        await asyncio.to_thread(self._start_again, number)
        if self._weights is not None:
            async with self._sending:
                await asyncio.to_thread(self._deliver, [number])
        return self._urls[number]

    def _deliver(self, numbers: Iterable[int]) -> None:
        """Sends the current weights to these engines."""
        assert self._weights is not None
        trainer, version = self._weights
        deliver(
            list(numbers),
            lambda some: trainer.update_weights({number: self._urls[number] for number in some}, version),
            self._urls,
            self._start_again,
        )

    def _start_again(self, number: int) -> None:
        self._urls[number] = start_again(self._names[number], self._start(number))

    def _start(self, number: int) -> Callable[[], str]:
        return lambda: str(get([self._actors[number].start.remote()], [self._names[number]])[0])

    @property
    def _names(self) -> list[str]:
        return [f"engine {number}" for number in range(len(self._actors))]
