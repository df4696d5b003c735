"""The rollout servers: an actor owns each one's process and replaces it when it dies."""

import asyncio
import logging
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
import torch
from ray.actor import ActorHandle

from recipe.cluster.calls import get
from recipe.cluster.placement import Placement
from recipe.cluster.trainer import TrainerGroup
from recipe.config import Config, Resolved
from recipe.errors import UserError
from recipe.rollout.servers.launch import Launch, SglangServer, launch_embedded, launch_sglang
from recipe.rollout.servers.process import EngineProcess
from recipe.seeds import derive

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Times that a dead engine is started before the run gives up."""

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


class EngineActor:
    """Owns one server process, which dies with this one."""

    def __init__(self, resolved: Resolved, number: int, on_gpus: bool, position: int) -> None:
        """`position`: the engine's first GPU among all that are in use, machine by machine."""
        self.resolved, self.number, self.on_gpus, self.position = resolved, number, on_gpus, position
        self.process: EngineProcess | None = None
        self.starts = 0

    def start(self) -> str:
        """Starts the server, killing the one before it, and returns its address once it is healthy."""
        if self.process is not None:
            self.process.kill()
        self.starts += 1
        logs = self.resolved.config.run_dir.resolve() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"engine-{self.number}.{self.starts}.log"
        self.process = EngineProcess(self._launch(), log, host=ray.util.get_node_ip_address())
        self.process.wait_healthy(self.resolved.config.rollout.rollout_engine_start_timeout_s)
        return self.process.url

    def keep_alive(self) -> str:
        """Starts the server again if it has died or does not answer. Returns its address."""
        if self.process is not None and self.process.answers(self.resolved.config.rollout.rollout_health_check_timeout):
            return self.process.url
        logger.warning("engine %d does not answer any more: it is started again", self.number)
        return self.start()

    def _launch(self) -> Launch:
        config = self.resolved.config
        model, seed = config.model.hf_checkpoint.resolve(), derive(config.misc.seed, "engine", self.number) % 2**31
        if config.rollout.engine == "sglang":
            return launch_sglang(
                model,
                SglangServer.of(config, self.on_gpus, first_gpu=self.position % max(1, torch.cuda.device_count())),
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
                resolved, number, placement.on_gpus, placement.first_of_engine(number)
            )
            for number in range(resolved.config.num_engines)
        ]
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

    def replace_dead(self) -> list[str]:
        """Starts engines again that have died or hang, for a time in which nothing is generated: they hold no trained
        weights then. Returns the addresses of all. Raises UserError if one does not become healthy."""
        self._urls = get([actor.keep_alive.remote() for actor in self._actors], self._names)
        return list(self._urls)

    def update_weights(self, trainer: TrainerGroup, version: int) -> None:
        """Sends the policy to every engine."""
        self._weights = trainer, str(version)
        trainer.update_weights(self._urls, str(version))

    async def recover(self, url: str) -> str:
        """Replaces the engine at `url` by a new one that holds the current weights, which the trainer still has: it
        does nothing else while something is generated. Returns the new address. Raises UserError if that fails."""
        number = self._urls.index(url)
        logger.warning("engine %d at %s does not generate any more: it is started again", number, url)
        self._urls[number] = address = await asyncio.to_thread(start_again, self._names[number], self._start(number))
        if self._weights is not None:
            trainer, version = self._weights
            async with self._sending:
                await asyncio.to_thread(trainer.update_weights, [address], version)
        return address

    def _start(self, number: int) -> Callable[[], str]:
        return lambda: str(get([self._actors[number].start.remote()], [self._names[number]])[0])

    @property
    def _names(self) -> list[str]:
        return [f"engine {number}" for number in range(len(self._actors))]
