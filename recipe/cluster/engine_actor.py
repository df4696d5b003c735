"""The owner of an engine: it starts the server, with its parts on other machines, and replaces them when they die."""

import logging
import threading
from collections.abc import Callable, Sequence

import ray

from recipe.cluster.multi_node_engine import EngineParts, launch_of, new_log
from recipe.cluster.placement import Seat, own_address
from recipe.config import Resolved
from recipe.engines.process import EngineProcess, PortTaken
from recipe.system.errors import UserError

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Times that an engine is started that died, or could not have a port, before the run gives up."""

ENDS = "ends"
"""Ray's group of threads that ends an engine, whatever another thread waits for meanwhile; see `rank_actor.ANSWERS`."""

WEIGHTS, THE_REST = ("weights",), ("kv_cache", "cuda_graph")
"""The memory that an engine takes again before it is sent weights, and after it."""


class EngineEnded(Exception):
    """What waited for an engine, or was to start it, finds it ended for good: the run is over."""


def in_attempts(name: str, start: Callable[[], str], failure: type[UserError]) -> str:
    """The address of an engine from `start`, which is tried START_ATTEMPTS times while it raises `failure`. Raises what
    the last one does, or any other."""
    for attempt in range(1, START_ATTEMPTS):
        try:
            return start()
        except failure as error:
            logger.warning(
                "%s does not start (attempt %d of %d, is started again): %s", name, attempt, START_ATTEMPTS, error
            )
    return start()


def start_again(name: str, start: Callable[[], str]) -> str:
    """The address of an engine that died, from `start`, which is tried START_ATTEMPTS times. Raises UserError, with the
    end of the engine's log, if it never works."""
    try:
        return in_attempts(name, start, UserError)
    except UserError as error:
        raise UserError(f"{name} died and could not be started again in {START_ATTEMPTS} attempts: {error}") from error


class EngineActor:
    """Owns one server process, which dies with this one, and, of an engine over several machines, its other parts: they
    start and end together. SGLang hands every request on to them."""

    def __init__(self, resolved: Resolved, number: int, gpus: Sequence[int], others: Sequence[Seat] = ()) -> None:
        """`gpus`: the numbers of its GPUs on its machine, if it has any; `others`: where its other parts go."""
        self.resolved, self.number, self.gpus = resolved, number, gpus
        self.parts = EngineParts(resolved, number, others)
        self.process: EngineProcess | None = None
        self.released: set[str] = set()
        """What memory the server has given back, by SGLang's tags."""
        self._ended = threading.Event()

    def start(self) -> str:
        """Starts the server, on other ports where one is taken. Returns its address once it is healthy. Raises
        UserError, and leaves none of its parts, if that or one of them fails."""
        return in_attempts(f"engine {self.number}", self._start, PortTaken)

    def _start(self) -> str:
        """Starts the server once, killing the one before it."""
        self._kill()
        config = self.resolved.config
        try:
            node = self.parts.start()
            self._check_wanted()
            launch = launch_of(self.resolved, self.number, self.gpus, node)
            log = new_log(config, f"engine-{self.number}")
            self.process = EngineProcess(launch, log, host=own_address(config))
            self.process.wait_healthy(config.rollout.rollout_engine_start_timeout_s, self._check)
        except (UserError, EngineEnded):
            self._kill()
            raise
        return self.process.url

    def _check(self) -> None:
        self._check_wanted()
        self.parts.check()

    def _check_wanted(self) -> None:
        if self._ended.is_set():
            raise EngineEnded(f"engine {self.number}")

    def keep_alive(self) -> str:
        """Starts the server again if it has died or does not generate, which it cannot be asked for while its memory is
        released. Returns its address. Raises UserError if that fails for good."""
        timeout_s = self.resolved.config.rollout.rollout_health_check_timeout
        if self.process is not None:
            asks = self.process.answers if self.released else self.process.generates
            if self.parts.are_alive() and asks(timeout_s):
                return self.process.url
        logger.warning("engine %d does not generate any more: it is started again", self.number)
        return start_again(f"engine {self.number}", self._start)

    def release_memory(self) -> None:
        """Has the server give back all its memory. One that does not is ended: it is in the trainer's way."""
        assert self.process is not None
        tags = (*WEIGHTS, *THE_REST)
        if self.process.release_memory(tags, self.resolved.config.rollout.update_weight_timeout):
            self.released.update(tags)
        else:
            logger.warning("engine %d does not give its memory back: it is ended", self.number)
            self._kill()

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
        return start_again(f"engine {self.number}", self._start)

    @ray.method(concurrency_group=ENDS)
    def stop(self) -> None:
        """Ends the server for good, also one that hangs or is just starting."""
        self._ended.set()
        if self.process is not None:
            self.process.stop()
        self.parts.end()

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
        self.released.clear()
        self.parts.end()
