"""Where the engines lie: each within one machine, or on whole ones, with a part on each of them."""

from dataclasses import dataclass

from recipe.config.schema import Config


@dataclass(frozen=True, slots=True)
class EnginePart:
    """What an engine has on one machine: a process of SGLang's, `--node-rank` of `--nnodes`."""

    engine: int
    node_rank: int
    nnodes: int
    first_gpu: int
    """Among the GPUs of all engines, which are numbered machine by machine."""
    gpus: int
    machine: int
    """The one with training ranks `machine * actor_num_gpus_per_node` and following."""


def nodes_per_engine(config: Config) -> int:
    """Machines that an engine lies on. A run on one machine has all its engines there."""
    cluster = config.cluster
    if cluster.actor_num_nodes == 1:
        return 1
    return max(1, config.sglang.rollout_num_gpus_per_engine // cluster.actor_num_gpus_per_node)


def parts_of(config: Config, engine: int) -> tuple[EnginePart, ...]:
    """The parts of engine number `engine`, in the order of SGLang's node ranks."""
    nnodes, of_engine = nodes_per_engine(config), config.sglang.rollout_num_gpus_per_engine
    gpus = of_engine // nnodes
    firsts = [engine * of_engine + rank * gpus for rank in range(nnodes)]
    return tuple(
        EnginePart(engine, rank, nnodes, first, gpus, machine_of_gpu(config, first))
        for rank, first in enumerate(firsts)
    )


def machine_of_gpu(config: Config, number: int) -> int:
    """The machine with the engines' GPU `number`: machines take as many as they have training ranks, in turn."""
    return number // config.cluster.actor_num_gpus_per_node % config.cluster.actor_num_nodes


def engine_gpus_of(config: Config, machine: int) -> int:
    """GPUs that engines have on a machine; with `colocate` they are the trainer's."""
    if not config.needs_engine:
        return 0
    return sum(machine_of_gpu(config, number) == machine for number in range(config.rollout_gpus))


def weight_sources(config: Config, engine: int) -> tuple[int, ...]:
    """The training ranks that hand engine number `engine` its weights, for each of SGLang's tensor-parallel ranks the
    one on the same GPU or, where they share none, the first one of its machine."""
    colocated, per_machine = config.cluster.colocate, config.cluster.actor_num_gpus_per_node
    if colocated and config.rollout.engine == "sglang":
        return tuple(part.first_gpu + gpu for part in parts_of(config, engine) for gpu in range(part.gpus))
    return tuple(part.machine * per_machine for part in parts_of(config, engine) for _ in range(part.gpus))


def gpus_of_fullest_machine(config: Config) -> int:
    """GPUs that the run takes of the machine of which it takes most: the first one."""
    own = 0 if config.cluster.colocate else engine_gpus_of(config, machine=0)
    return config.cluster.actor_num_gpus_per_node + own
