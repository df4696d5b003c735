"""The further machines of an engine over several: an actor on each carries SGLang's process there."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from recipe.cluster.calls import get
from recipe.cluster.placement import Seat, own_address, socket_interfaces
from recipe.config import Config, Resolved
from recipe.engines.dist_init import DERIVED_FROM_ADDRESS, DistInit
from recipe.engines.launch import INITIAL_VERSION, Launch, Node, SglangServer, launch_embedded, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.plan.preflight import colocated_cache_tokens
from recipe.system.errors import UserError
from recipe.system.ports import reserve_derived
from recipe.system.seeds import derive

APPEARS_WITHIN_S = 300.0
"""Longest wait for an actor's process on another machine."""
ANSWERS_WITHIN_S = 30.0
"""Longest wait for an answer of an actor that is there."""
ENDS_WITHIN_S = 3.0
"""Longest wait for the end of an actor's server, before it is killed with the actor."""


def threads_of_engine(config: Config) -> int:
    """CPU threads of an engine without a GPU: as configured, or the machine's cores shared by the engines."""
    if config.cluster.num_cpus_per_engine is not None:
        return max(1, int(config.cluster.num_cpus_per_engine))
    return max(1, len(os.sched_getaffinity(0)) // config.num_engines)


def launch_of(resolved: Resolved, number: int, gpus: Sequence[int], node: Node | None) -> Launch:
    """How engine `number` is started, or its part on one machine."""
    config = resolved.config
    shares_gpus = bool(gpus) and config.cluster.colocate
    model = config.model.hf_checkpoint.resolve()
    if config.rollout.engine == "sglang":
        return launch_sglang(
            model,
            SglangServer.of(config, gpus, node, colocated_cache_tokens(resolved) if shares_gpus else None),
            weight_version=INITIAL_VERSION,
            threads=threads_of_engine(config),
            context_length=resolved.max_context_len,
            random_seed=derive(config.misc.seed, "engine", number) % 2**31,
        )
    return launch_embedded(
        model,
        weight_version=INITIAL_VERSION,
        threads=threads_of_engine(config),
        context_length=resolved.max_context_len,
        returns_routed_experts=config.grpo.replays_rollouts,
    )


def new_log(config: Config, name: str) -> Path:
    """Where the server called `name` writes, a file for every start."""
    logs = config.run_dir.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = sum(1 for _ in logs.glob(f"{name}.*.log"))
    return logs / f"{name}.{started + 1}.log"


class EngineNodeActor:
    """Carries one process of SGLang's with a --node-rank above 0, which dies with this one."""

    def __init__(self, resolved: Resolved, number: int, node_rank: int, gpus: Sequence[int]) -> None:
        """`gpus`: the numbers of its GPUs on its machine, if it has any."""
        self.resolved, self.number, self.node_rank, self.gpus = resolved, number, node_rank, gpus
        self.process: EngineProcess | None = None
        self.derived = ExitStack()

    def reserve(self, port: int) -> bool:
        """Whether the ports that SGLang derives from `port` are free here. They are kept, and those before given up."""
        self.derived.close()
        reserved = reserve_derived(port, DERIVED_FROM_ADDRESS)
        self.derived = reserved or ExitStack()
        return reserved is not None

    def start(self, dist_init_addr: str, nnodes: int) -> None:
        """Starts the process, which waits for the others at `dist_init_addr`."""
        address = own_address(self.resolved.config)
        node = Node(self.node_rank, nnodes, dist_init_addr, address, socket_interfaces(address))
        log = new_log(self.resolved.config, f"engine-{self.number}-node-{self.node_rank}")
        self.process = EngineProcess(launch_of(self.resolved, self.number, self.gpus, node), log, host=address)

    def check(self) -> None:
        """Raises UserError if the process has ended."""
        assert self.process is not None
        self.process.check_alive()

    def end(self) -> None:
        """Ends the process at once."""
        if self.process is not None:
            self.process.kill()
        self.derived.close()


class FurtherNodes:
    """All further parts of one engine, as the actor of its first sees them. Every start has actors of its own, which
    end when this process does, as Ray sees to."""

    def __init__(self, resolved: Resolved, number: int, seats: Sequence[Seat]) -> None:
        self._resolved, self._number, self._seats = resolved, number, seats
        self._actors: list[ActorHandle] = []
        self._dist_init: DistInit | None = None

    def start(self) -> Node | None:
        """Starts the parts, which wait for the first one; returns what that is to be told. None without parts. Raises
        UserError if one cannot start."""
        if not self._seats:
            return None
        actor: Any = ray.remote(EngineNodeActor)
        self._actors = [
            actor.options(**seat.options).remote(self._resolved, self._number, rank, seat.gpus)
            for rank, seat in enumerate(self._seats, start=1)
        ]
        address, nnodes = own_address(self._resolved.config), 1 + len(self._seats)
        self._dist_init = DistInit.open(
            address, lambda port: all(self._ask("reserve", port, timeout_s=APPEARS_WITHIN_S))
        )
        self._ask("start", self._dist_init.address, nnodes)
        return Node(0, nnodes, self._dist_init.address, address, socket_interfaces(address))

    def check(self) -> None:
        """Raises UserError, with what the part's log says, if one has ended, is gone or does not answer."""
        if self._actors:
            self._ask("check")

    def are_alive(self) -> bool:
        """Whether none has ended."""
        try:
            self.check()
        except UserError:
            return False
        return True

    def end(self) -> None:
        """Ends all of them at once, also those that hang."""
        if self._actors:
            parts, self._actors = self._actors, []
            ray.wait([part.end.remote() for part in parts], num_returns=len(parts), timeout=ENDS_WITHIN_S)
            for part in parts:
                ray.kill(part)
        if self._dist_init is not None:
            self._dist_init.close()
            self._dist_init = None

    def _ask(self, verb: str, *arguments: Any, timeout_s: float = ANSWERS_WITHIN_S) -> list[Any]:
        names = [f"part {rank} of engine {self._number}" for rank in range(1, 1 + len(self._actors))]
        return get([getattr(part, verb).remote(*arguments) for part in self._actors], names, timeout_s)
