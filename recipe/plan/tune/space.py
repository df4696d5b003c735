"""Settings that change how fast a run is and not what it learns: the values that are tried."""

from collections.abc import Iterator, Mapping
from itertools import product

from recipe.config import Architecture, Config
from recipe.config.engine_placement import gpus_of_fullest_machine
from recipe.config.flags import SGLANG_KEY
from recipe.config.sglang_rules import EngineLayout
from recipe.config.speculation_rules import EAGLE
from recipe.plan.engine import static_fraction
from recipe.plan.layout import divisors

Values = Mapping[str, object]
"""Settings by dotted key, as a recipe has them. An argument of SGLang's that is False is left out."""

AT_ONCE = (8, 16, 32, 64, 128)
"""Sequences at once of a group of GPUs, and the largest batch of its CUDA graphs."""
FRACTIONS = (0.6, 0.7, 0.8)
DRAFT_STEPS = 3
DRAFTS_UP_TO = (4, 8, 16)
"""Sequences of an engine up to which it drafts."""
NO_DRAFTS: Values = {
    f"{SGLANG_KEY}.{name}": False
    for name in (
        "speculative_algorithm",
        "speculative_num_steps",
        "speculative_eagle_topk",
        "speculative_num_draft_tokens",
    )
}
DRAFTS: Values = {
    f"{SGLANG_KEY}.speculative_algorithm": "EAGLE",
    f"{SGLANG_KEY}.speculative_num_steps": DRAFT_STEPS,
    f"{SGLANG_KEY}.speculative_eagle_topk": 1,
    f"{SGLANG_KEY}.speculative_num_draft_tokens": DRAFT_STEPS + 1,
}
PACKS = (8192, 16384, 32768)
"""Tokens of a microbatch."""
RECOMPUTED = (1.0, 0.75, 0.5, 0.25)
"""Shares of a stage's layers that are recomputed."""
OFFLOADED = (1.0, 0.75, 0.5)
"""Shares of the optimizer in host memory."""
TENSOR, CONTEXT = (1, 2, 4), (1, 2)


def splits(config: Config) -> Iterator[Values]:
    """The given division of each machine's GPUs between trainer and engines and, where they share none, others to start
    from: experts over the trainer's GPUs of a machine, and engines of as many."""
    yield {}
    nodes, given = config.cluster.actor_num_nodes, config.cluster.actor_num_gpus_per_node
    each = gpus_of_fullest_machine(config)
    if config.cluster.colocate or config.rollout_gpus != nodes * (each - given):
        return
    for training in divisors(each):
        if training not in (given, each):
            yield {
                "cluster.actor_num_gpus_per_node": training,
                "cluster.rollout_num_gpus": nodes * (each - training),
                "perf.tensor_model_parallel_size": 1,
                "perf.sequence_parallel": False,
                "perf.context_parallel_size": 1,
                "perf.expert_model_parallel_size": training,
                **_engine(training, training, AT_ONCE[0], static_fraction(config)),
            }


def engines(config: Config, architecture: Architecture) -> Iterator[Values]:
    """Ways to spread the rollout's engines over the GPUs that they have: engines within a machine, with DP attention
    and without, sequences at once, memory and drafts."""
    each = config.cluster.actor_num_gpus_per_node
    fractions = sorted({*FRACTIONS, static_fraction(config)})
    for gpus in divisors(each):
        for groups in divisors(gpus):
            if architecture.num_attention_heads % (gpus // groups):
                continue
            for sequences, fraction in product(AT_ONCE, fractions):
                found = _engine(gpus, groups, sequences, fraction)
                yield from ({**found, **drafts} for drafts in _drafts(config, groups))


def at_once(config: Config) -> Iterator[Values]:
    """Other numbers of sequences that the engines make at once, and saves beside training or between steps."""
    groups = EngineLayout.of(config).groups
    for sequences, asynchronous in product(AT_ONCE, (False, True)):
        yield {
            f"{SGLANG_KEY}.max_running_requests": sequences * groups,
            f"{SGLANG_KEY}.cuda_graph_max_bs_decode": sequences,
            "checkpoint.async_save": asynchronous,
        }


def _engine(gpus: int, groups: int, sequences: int, fraction: float) -> dict[str, object]:
    several = groups > 1
    arguments: dict[str, object] = {
        "enable_dp_attention": several,
        "dp_size": groups if several else False,
        "enable_dp_lm_head": several,
        "moe_dense_tp_size": 1 if several else False,
        "ep_size": gpus if gpus > 1 else False,
        "ep_num_redundant_experts": False,
        "max_running_requests": sequences * groups,
        "cuda_graph_max_bs_decode": sequences,
        "mem_fraction_static": fraction,
    }
    return {"sglang.rollout_num_gpus_per_engine": gpus} | {
        f"{SGLANG_KEY}.{name}": value for name, value in arguments.items()
    }


def _drafts(config: Config, groups: int) -> Iterator[Values]:
    """None, all the time, or for few sequences at once only, which SGLang cannot do with DP attention."""
    yield NO_DRAFTS
    if config.sglang.args.get("speculative_algorithm", EAGLE[0]) in EAGLE:
        yield DRAFTS
        if groups == 1:
            yield from ({**DRAFTS, "sglang.speculative_max_batch": most} for most in DRAFTS_UP_TO)


def trainers(config: Config, architecture: Architecture) -> Iterator[Values]:
    """Ways to compute the same steps: packs, recomputation, where the optimizer lies, saves beside training and, on
    several machines, the layout."""
    offloaded = OFFLOADED if config.optimizer.optimizer_cpu_offload else (None,)
    for layout in _layouts(config, architecture):
        stages = layout.get("perf.pipeline_model_parallel_size", config.perf.pipeline_model_parallel_size)
        assert isinstance(stages, int)
        layers = -(-architecture.num_hidden_layers // stages)
        for pack, share, asynchronous, offload in product(PACKS, RECOMPUTED, (False, True), offloaded):
            yield {
                **layout,
                "perf.max_tokens_per_gpu": pack,
                **_recomputation(share, layers),
                "perf.moe_permute_fusion": True,
                "checkpoint.async_save": asynchronous,
                **({} if offload is None else {"optimizer.optimizer_offload_fraction": offload}),
            }


def _recomputation(share: float, layers: int) -> Values:
    """All layers one by one, or the first ones of each stage."""
    whole = share == 1
    return {
        "perf.recompute_granularity": "full",
        "perf.recompute_method": "uniform" if whole else "block",
        "perf.recompute_num_layers": 1 if whole else max(1, round(share * layers)),
    }


def _layouts(config: Config, architecture: Architecture) -> Iterator[Values]:
    """The given one and, where ranks of several machines share the optimizer's state, others with as many ranks."""
    yield {}
    if config.cluster.actor_num_nodes == 1:
        return
    layers = architecture.num_hidden_layers
    for tensor, context, stages in product(TENSOR, CONTEXT, divisors(config.cluster.actor_num_nodes)):
        rest = -(-layers // stages)
        yield {
            "perf.tensor_model_parallel_size": tensor,
            "perf.sequence_parallel": tensor > 1,
            "perf.context_parallel_size": context,
            "perf.pipeline_model_parallel_size": stages,
            **({"perf.decoder_last_pipeline_num_layers": layers - rest * (stages - 1)} if stages > 1 else {}),
        }
