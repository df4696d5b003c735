"""Where the processes of a run go: one bundle of resources a GPU (or, on a CPU, a process), ordered by machine."""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from recipe.cluster.ray_node import LOOPBACK
from recipe.config import Config
from recipe.config.engine_placement import EnginePart, machine_of_gpu, parts_of
from recipe.plan.machine import read_gpus
from recipe.system.errors import UserError

PLACEMENT_TIMEOUT_S = 300
TRAINER_SHARE, ENGINE_SHARE = 0.6, 0.3
"""Shares of a GPU where trainer and engines take turns on it: Ray's bookkeeping, not a limit."""

_NODE_SHARE = 0.001
"""As much of the resource by which Ray names a node: enough to ask for the node."""


@dataclass(frozen=True)
class Seat:
    """Where the actor sits that owns an engine, or a part of one."""

    options: dict[str, Any]
    """Ray's, of the actor."""
    gpus: tuple[int, ...]
    """The numbers of its GPUs on its machine. Ray would show the actor the first one only."""


@dataclass(frozen=True)
class Placement:
    """Reserved resources. Training ranks come first; engines share their bundles when colocated."""

    group: PlacementGroup
    bundles: list[int]
    """Bundle numbers, machine by machine and GPU by GPU, so that neighbouring ranks share one."""
    gpus: list[int]
    """The number of each bundle's GPU on its machine, in the same order; empty without GPUs."""
    on_gpus: bool
    config: Config

    def for_rank(self, rank: int) -> dict[str, Any]:
        """Options of the actor of a training rank."""
        return self._options(rank, TRAINER_SHARE if self.config.cluster.colocate else 1.0)

    def gpu_of_rank(self, rank: int) -> int | None:
        """The number of its GPU on its machine, if it has one."""
        return self.gpus[rank] if self.gpus else None

    def seats(self, engine: int) -> tuple[Seat, ...]:
        """Where the actors of an engine's parts sit: each at the first of its part's bundles."""
        return tuple(map(self._seat, parts_of(self.config, engine)))

    def _seat(self, part: EnginePart) -> Seat:
        first = part.first_gpu if self.config.cluster.colocate else part.first_gpu + self.config.world_size
        return Seat(self._options(first, ENGINE_SHARE), tuple(self.gpus[first : first + part.gpus]))

    def _options(self, position: int, gpu_share: float) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[position])
        return {"scheduling_strategy": strategy, "num_cpus": 0, "num_gpus": gpu_share if self.on_gpus else 0}


def own_address(config: Config) -> str:
    """Where this machine is met: on its loopback, unless the run has several (Ray tells the address of a network even
    where it was told to keep to itself)."""
    return LOOPBACK if config.cluster.actor_num_nodes == 1 else ray.util.get_node_ip_address()


def socket_interfaces(address: str) -> dict[str, str]:
    """Variables that bind gloo and NCCL to the interface with this machine's `address`: by themselves they take what
    the host's name resolves to, often an address that no other machine reaches. What the user has set stays."""
    interfaces = (name for name, entries in psutil.net_if_addrs().items() if address in (e.address for e in entries))
    names = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} - os.environ.keys()
    return dict.fromkeys(names, next(interfaces)) if names else {}


def nccl_settings(config: Config) -> dict[str, str]:
    """Variables that a rank's NCCL needs to form a group with SGLang's, to which weights are broadcast. SGLang does
    without memory by the driver's handles (cuMem) unless it is told; where only one side has it, the group's first
    broadcast fails ("invalid argument"). What the user has set stays: SGLang's processes have it too."""
    broadcasts = config.rollout.update_weight_transfer in (None, "distributed") and not config.cluster.colocate
    if config.rollout.engine != "sglang" or not broadcasts or "NCCL_CUMEM_ENABLE" in os.environ:
        return {}
    return {"NCCL_CUMEM_ENABLE": "0"}


def uses_gpus(config: Config) -> bool:
    """Whether the run computes on GPUs. Raises UserError if it is told to and there is none."""
    # Ray may have been told of none: then the run is refused for want of them, not carried out on the CPU.
    present = ray.cluster_resources().get("GPU", 0) > 0 or bool(read_gpus())
    if config.cluster.device == "cuda" and not present:
        raise UserError("--device cuda: there is no GPU here; use --device cpu, or a machine with GPUs")
    return present and config.cluster.device != "cpu"


def place(config: Config) -> Placement:
    """Reserves what the run needs. Raises UserError if the cluster does not have it."""
    on_gpus = uses_gpus(config)
    engines = 0 if config.cluster.colocate or not config.needs_engine else config.rollout_gpus
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}
    count = config.world_size + engines
    if config.cluster.actor_num_nodes > 1:
        return _place_on_nodes(config, bundle, engines, on_gpus)
    group = placement_group([bundle] * count, strategy="PACK")
    if not group.wait(PLACEMENT_TIMEOUT_S):
        have = {name: ray.cluster_resources().get(name, 0) for name in bundle}
        raise UserError(
            f"the run needs {count} x {bundle} ({config.world_size} training ranks, {engines} engine slots) but the "
            f"Ray cluster has {have}: add machines or lower --actor-num-nodes, --actor-num-gpus-per-node or "
            "--rollout-num-gpus"
        )
    node_of = placement_group_table(group)["bundles_to_node_id"]
    gpu_of = gpu_numbers(group, count) if on_gpus else dict.fromkeys(node_of, 0)
    bundles = sorted(node_of, key=lambda number: (node_of[number], gpu_of[number], number))
    return Placement(group, bundles, [gpu_of[number] for number in bundles] if on_gpus else [], on_gpus, config)


def _place_on_nodes(config: Config, bundle: dict[str, float], engines: int, on_gpus: bool) -> Placement:
    """Every node gets its share of consecutive ranks, so that groups of ranks that fit into a node (expert parallelism)
    lie within one; the first node is the one at `--master-addr`, where the ranks meet."""
    nodes, per_node = config.cluster.actor_num_nodes, config.cluster.actor_num_gpus_per_node
    kind = "GPU" if on_gpus else "CPU"
    fit = [n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(kind, 0) >= per_node]
    fit.sort(key=lambda address: (address != config.cluster.master_addr, address))
    if len(fit) < nodes:
        raise UserError(
            f"--actor-num-nodes {nodes} with {per_node} x {kind} each, but the Ray cluster has only {len(fit)} such "
            f"nodes ({', '.join(fit) or 'none'}): let the others join (make join)"
        )
    chosen = [address for address in fit[:nodes] for _ in range(per_node)]
    chosen += [fit[machine_of_gpu(config, number)] for number in range(engines)]
    group = placement_group([{**bundle, f"node:{address}": _NODE_SHARE} for address in chosen])
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise UserError(
            f"the run needs {config.world_size} training ranks and {engines} engine slots on the nodes "
            f"{', '.join(fit[:nodes])}, which are busy or too small"
        )
    gpu_of = gpu_numbers(group, len(chosen)) if on_gpus else dict.fromkeys(range(len(chosen)), 0)
    bundles = sorted(gpu_of, key=lambda number: (number // per_node, gpu_of[number], number))
    return Placement(group, bundles, [gpu_of[number] for number in bundles] if on_gpus else [], on_gpus, config)


def gpu_numbers(group: PlacementGroup, count: int) -> dict[int, int]:
    """The number of the GPU of each of the group's `count` bundles on its machine."""
    number: Any = ray.remote(lambda: int(ray.get_gpu_ids()[0]))  # no function of a module, which would be imported

    def ask(bundle: int) -> ray.ObjectRef:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        reference: ray.ObjectRef = number.options(scheduling_strategy=strategy, num_cpus=0, num_gpus=0.01).remote()
        return reference

    return dict(enumerate(ray.get([ask(bundle) for bundle in range(count)])))
