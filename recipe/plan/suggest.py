"""The smallest change of flags that makes a run fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from recipe.config import Config
from recipe.config.layout_rules import RULES
from recipe.config.schema import Group
from recipe.plan.engine import static_fraction
from recipe.plan.plan import Plan, make_plan

MOST_CHANGES = 3
LEAST_FRACTION, FRACTION_STEP, MOST_FRACTION = 0.2, 0.05, 0.95
"""Values of `mem_fraction_static` that are tried."""


@dataclass(frozen=True)
class Change:
    """Flags, and the fields of a group that they set."""

    flags: str
    group: str
    values: tuple[tuple[str, object], ...]

    def applied(self, config: Config) -> Config:
        """`config` with the change."""
        group = dict(config)[self.group]
        assert isinstance(group, Group)
        return config.model_copy(update={self.group: group.model_copy(update=dict(self.values))})


def suggestion(plan: Plan) -> tuple[Change, ...]:
    """The fewest and mildest changes with which everything fits; none if nothing tried does."""
    on_gpu = plan.gpu is not None
    for changes in _combinations(list(_kinds(plan))):
        config = plan.resolved.config
        for change in changes:
            config = change.applied(config)
        resolved = replace(plan.resolved, config=config)
        if any(sentence for rule in RULES for sentence in rule(config, resolved.architecture)):
            continue
        if make_plan(resolved, plan.machine, on_gpu).fits:
            return changes
    return ()


def _combinations(kinds: list[list[Change]]) -> Iterator[tuple[Change, ...]]:
    """One change of each of some kinds, fewer and milder ones first."""
    for count in range(1, MOST_CHANGES + 1):
        choices: list[tuple[int, tuple[Change, ...]]] = []
        for chosen in itertools.combinations(kinds, count):
            choices += (
                (sum(rank for rank, _ in picks), tuple(change for _, change in picks))
                for picks in itertools.product(*map(enumerate, chosen))
            )
        yield from (changes for _, changes in sorted(choices, key=lambda one: one[0]))


def _kinds(plan: Plan) -> Iterator[list[Change]]:
    """Changes that bear on what does not fit, each kind from the mildest on."""
    config = plan.resolved.config
    perf, settings = config.perf, config.optimizer
    if plan.gpu is not None and (min(one.margin for one in plan.gpu.phases) < 0 or _cache_is_short(plan)):
        chunk = perf.log_probs_chunk_size
        yield [_one("perf", "log_probs_chunk_size", size) for size in (4096, 2048, 1024) if size < chunk]
        if perf.recompute_granularity != "full":
            flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
            yield [Change(flags, "perf", _full_recomputation())]
        if perf.max_tokens_per_gpu and perf.use_dynamic_batch_size:
            least = -(-plan.longest_sample // perf.context_parallel_size)
            halves = [perf.max_tokens_per_gpu // 2**power for power in (1, 2, 3)]
            smaller = sorted({max(size, least) for size in halves}, reverse=True)
            yield [_one("perf", "max_tokens_per_gpu", size) for size in smaller if size < perf.max_tokens_per_gpu]
        offloaded = settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 0.0
        yield [_offload(share) for share in (0.25, 0.5, 0.75, 1.0) if share > offloaded]
        if plan.gpu.engine is not None:
            yield list(_static_fractions(config, up=_cache_is_short(plan)))
    if min(one.margin for one in plan.host) < 0:
        if settings.optimizer_cpu_offload:
            fractions = (0.75, 0.5, 0.25)
            yield [_offload(share) for share in fractions if share < settings.optimizer_offload_fraction]
        if config.checkpoint.async_save:
            yield [Change("--no-async-save", "checkpoint", (("async_save", False),))]
    if not plan.disk.fits:
        yield [_one("checkpoint", "save_keep", keep) for keep in (3, 2, 1) if keep < plan.disk.kept - 1]


def _cache_is_short(plan: Plan) -> bool:
    engine = plan.gpu.engine if plan.gpu is not None else None
    return engine is not None and engine.tokens < plan.longest_sample


def _one(group: str, name: str, value: int) -> Change:
    return Change(f"--{name.replace('_', '-')} {value}", group, ((name, value),))


def _offload(share: float) -> Change:
    flags = "--optimizer-cpu-offload" if share == 1 else f"--optimizer-cpu-offload --optimizer-offload-fraction {share}"
    return Change(flags, "optimizer", (("optimizer_cpu_offload", True), ("optimizer_offload_fraction", share)))


def _full_recomputation() -> tuple[tuple[str, object], ...]:
    return (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))


def _static_fractions(config: Config, up: bool) -> Iterator[Change]:
    args = dict(config.sglang.args)
    start = static_fraction(config)
    for step in range(1, 10):
        value = round(start + (FRACTION_STEP if up else -FRACTION_STEP) * step, 2)
        if LEAST_FRACTION <= value <= MOST_FRACTION:
            flags = f"--sglang-mem-fraction-static {value}"
            yield Change(flags, "sglang", (("args", args | {"mem_fraction_static": value}),))
