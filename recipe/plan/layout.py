"""What the layout divides, and by what it may be divided."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from recipe.config import Resolved
from recipe.config.sglang_rules import EngineLayout
from recipe.plan.shards import stage_lengths


@dataclass(frozen=True)
class Division:
    """A number of things over a number of ranks."""

    what: str
    size: int
    over: str
    parts: int
    each: str
    """What one rank gets."""
    valid: tuple[int, ...]
    """What `parts` may be, on so many GPUs."""


def divisors(number: int) -> tuple[int, ...]:
    """In order."""
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def divisions(resolved: Resolved) -> Iterator[Division]:
    """The trainer's divisions, then the engine's, as far as there is something to divide."""
    config, a = resolved.config, resolved.architecture
    perf, world = config.perf, config.world_size
    tp, ep = perf.tensor_model_parallel_size, perf.expert_model_parallel_size
    yield _even("attention heads", a.num_attention_heads, "TP", tp, world)
    yield _even("experts", a.n_routed_experts, "EP", ep, world)
    stages = stage_lengths(config, a)
    lengths = "+".join(map(str, stages))
    # Any number of stages: --decoder-last-pipeline-num-layers takes an uneven rest.
    deepest = tuple(stages for stages in divisors(world) if stages <= a.num_hidden_layers)
    yield Division("layers", a.num_hidden_layers, "PP", len(stages), lengths, deepest)
    batch, ranks = config.global_batch_size, config.data_parallel_size
    yield Division("samples a step", batch, "DP", ranks, str(batch // ranks), divisors(gcd(batch, world)))
    if config.rollout.engine == "sglang" and config.needs_engine:
        yield from _engine(resolved)


def _even(what: str, size: int, over: str, parts: int, world: int) -> Division:
    return Division(what, size, over, parts, str(size // parts), divisors(gcd(size, world)))


def _engine(resolved: Resolved) -> Iterator[Division]:
    layout, a = EngineLayout.of(resolved.config), resolved.architecture
    heads = a.num_attention_heads
    if layout.dp_attention:
        valid = tuple(layout.tp // dp for dp in divisors(layout.tp) if heads % (layout.tp // dp) == 0)
        attention = layout.tp // layout.dp
        yield Division("engine heads", heads, "attention TP", attention, str(heads // attention), tuple(sorted(valid)))
    experts = a.n_routed_experts + layout.redundant_experts
    yield _even("engine experts", experts, "EP", layout.ep, layout.tp)
