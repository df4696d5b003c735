"""An engine as Ray carries it: its server, with its parts on other machines, started and ended as the group says."""

import threading
from collections.abc import Sequence

import ray

from recipe.cluster.engine_nodes import FurtherNodes, launch_of, new_log
from recipe.cluster.placement import Seat, own_address
from recipe.config import Resolved
from recipe.engines.process import EngineProcess
from recipe.system.errors import UserError

ENDS = "ends"
"""Ray's group of threads that ends an engine, whatever another thread waits for meanwhile; see `rank_actor.ANSWERS`."""

WEIGHTS, THE_REST = ("weights",), ("kv_cache", "cuda_graph")
"""The memory that an engine takes again before it is sent weights, and after it."""


class EngineEnded(Exception):
    """What waited for an engine, or was to start it, finds it ended for good: the run is over."""


class EngineActor:
    """Carries one server process, which dies with this one, and, of an engine over several machines, its other parts:
    they start and end together. SGLang hands every request on to them. It does what `EngineGroup` decides."""

    def __init__(self, resolved: Resolved, number: int, gpus: Sequence[int], others: Sequence[Seat] = ()) -> None:
        """`gpus`: the numbers of its GPUs on its machine, if it has any; `others`: where its other parts go."""
        self.resolved, self.number, self.gpus = resolved, number, gpus
        self.nodes = FurtherNodes(resolved, number, others)
        self.process: EngineProcess | None = None
        self.released: set[str] = set()
        """What memory the server has given back, by SGLang's tags."""
        self._ended = threading.Event()

    def start(self) -> str:
        """Starts the server once, ending the one before it. Returns its address once it is healthy. Raises UserError,
        and leaves none of its parts, if that or one of them fails: PortTaken if the server could not have a port."""
        self.kill()
        config = self.resolved.config
        try:
            node = self.nodes.start()
            self._check_wanted()
            launch = launch_of(self.resolved, self.number, self.gpus, node)
            log = new_log(config, f"engine-{self.number}")
            self.process = EngineProcess(launch, log, host=own_address(config))
            self.process.wait_healthy(config.rollout.rollout_engine_start_timeout_s, self._check)
        except (UserError, EngineEnded):
            self.kill()
            raise
        return self.process.url

    def _check(self) -> None:
        self._check_wanted()
        self.nodes.check()

    def _check_wanted(self) -> None:
        if self._ended.is_set():
            raise EngineEnded(f"engine {self.number}")

    def works(self) -> bool:
        """Whether the server generates or, while its memory is released, or whoever it generates for watches it, at
        least answers."""
        if self.process is None or not self.nodes.are_alive():
            return False
        rollout = self.resolved.config.rollout
        is_watched = rollout.update_weight_in_flight is not None
        asks = self.process.answers if self.released or is_watched else self.process.generates
        return asks(rollout.rollout_health_check_timeout)

    def continue_generation(self) -> bool:
        """Has the server go on after it took weights in flight. Whether it does."""
        timeout_s = self.resolved.config.rollout.rollout_health_check_timeout
        return self.process is not None and self.process.continue_generation(timeout_s)

    def release_memory(self) -> bool:
        """Has the server give back all its memory. Whether it did."""
        tags = (*WEIGHTS, *THE_REST)
        if self.process is None or not self.process.release_memory(tags, self._memory_timeout_s):
            return False
        self.released.update(tags)
        return True

    def resume_memory(self, tags: Sequence[str]) -> bool:
        """Has the server take memory again that it gave back. Whether it holds all of `tags` now."""
        again = [tag for tag in tags if tag in self.released]
        if again and not (self.process and self.process.resume_memory(again, self._memory_timeout_s)):
            return False
        self.released.difference_update(again)
        return True

    @property
    def _memory_timeout_s(self) -> float:
        return self.resolved.config.rollout.update_weight_timeout

    def kill(self) -> None:
        """Ends the server and its other parts at once; they can be started again."""
        if self.process is not None:
            self.process.kill()
        self.released.clear()
        self.nodes.end()

    @ray.method(concurrency_group=ENDS)
    def stop(self) -> None:
        """Ends the server for good, also one that hangs or is just starting."""
        self._ended.set()
        if self.process is not None:
            self.process.stop()
        self.nodes.end()
