"""Rules of the trainer's parallel layout. Each yields a sentence for what it refuses."""

from collections.abc import Iterator

from recipe.config.architecture import Architecture
from recipe.config.error_text import nearest
from recipe.config.schema import Config


def ranks_divide(config: Config, _: Architecture) -> Iterator[str]:
    """TP x PP x CP, and ETP x EP x PP for the experts, must divide the ranks."""
    perf, world = config.perf, config.world_size
    ranks = f"the {world} ranks (--actor-num-nodes x --actor-num-gpus-per-node)"
    if world % config.model_parallel_size:
        tp, pp, cp = perf.tensor_model_parallel_size, perf.pipeline_model_parallel_size, perf.context_parallel_size
        yield f"TP {tp} x PP {pp} x CP {cp} = {config.model_parallel_size} does not divide {ranks}"
    etp, ep = perf.expert_tensor_parallel_size, perf.expert_model_parallel_size
    experts_over = etp * ep * perf.pipeline_model_parallel_size
    if world % experts_over:
        pp = perf.pipeline_model_parallel_size
        yield f"for the experts ETP {etp} x EP {ep} x PP {pp} = {experts_over} does not divide {ranks}"


def tensors_divide(config: Config, architecture: Architecture) -> Iterator[str]:
    """What TP, EP and ETP split must have parts of one size."""
    tp, ep = config.perf.tensor_model_parallel_size, config.perf.expert_model_parallel_size
    etp = config.perf.expert_tensor_parallel_size
    for flag, parts, what, size in (
        ("--tensor-model-parallel-size", tp, "attention heads", architecture.num_attention_heads),
        ("--tensor-model-parallel-size", tp, "vocabulary rows", architecture.vocab_size),
        ("--tensor-model-parallel-size", tp, "columns of the dense MLP", architecture.intermediate_size),
        ("--expert-model-parallel-size", ep, "experts", architecture.n_routed_experts),
        ("--expert-tensor-parallel-size", etp, "columns of an expert", architecture.moe_intermediate_size),
    ):
        if size % parts:
            valid = nearest(parts, (part for part in range(1, size + 1) if size % part == 0))
            yield f"{flag} {parts} does not divide the model's {size} {what}; nearest that do: {valid}"


def permutation_is_for_alltoall(config: Config, _: Architecture) -> Iterator[str]:
    """Gathers need to know how many experts a token has on a rank."""
    if config.perf.moe_permute_fusion and config.perf.moe_token_dispatcher_type != "alltoall":
        yield "--moe-permute-fusion needs --moe-token-dispatcher-type alltoall"


def tensor_parallel_needs_sequence_parallel(config: Config, _: Architecture) -> Iterator[str]:
    """Megatron refuses to train experts with TP alone."""
    tp = config.perf.tensor_model_parallel_size
    if tp > 1 and not config.perf.sequence_parallel:
        yield f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel: megatron refuses it otherwise"


def layers_divide(config: Config, architecture: Architecture) -> Iterator[str]:
    """The stages between an explicit first and last one must be even; the sentence says a split that works."""
    perf, layers = config.perf, architecture.num_hidden_layers
    stages = perf.pipeline_model_parallel_size
    first, last = perf.decoder_first_pipeline_num_layers, perf.decoder_last_pipeline_num_layers
    ends = [length for length in (first, last) if length is not None]
    if stages == 1:
        if ends:
            yield "--decoder-first/last-pipeline-num-layers need --pipeline-model-parallel-size above 1"
        return
    if stages > layers:
        yield f"--pipeline-model-parallel-size {stages} leaves stages without a layer: the model has {layers}"
        return
    between, rest = stages - len(ends), layers - sum(ends)
    if (between == 0 and rest != 0) or (between > 0 and (rest < between or rest % between)):
        given = f" with {' and '.join(map(str, ends))} of them fixed" if ends else ""
        yield f"{layers} layers{given} do not split evenly over PP {stages}; {_uneven_split(layers, stages)}"


def _uneven_split(layers: int, stages: int) -> str:
    each = -(-layers // stages)
    if each * (stages - 1) >= layers:
        each = layers // stages
    last = layers - each * (stages - 1)
    split = "+".join(map(str, [each] * (stages - 1) + [last]))
    return f"--decoder-last-pipeline-num-layers {last} makes it {split}"


def virtual_stages_divide(config: Config, architecture: Architecture) -> Iterator[str]:
    """An interleaved pipeline needs stages, each a whole number of virtual ones."""
    perf, virtual = config.perf, config.perf.num_layers_per_virtual_pipeline_stage
    if virtual is None:
        return
    stages = perf.pipeline_model_parallel_size
    if stages == 1:
        yield "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size above 1"
        return
    first, last = perf.decoder_first_pipeline_num_layers, perf.decoder_last_pipeline_num_layers
    ends = [length for length in (first, last) if length is not None]
    between = stages - len(ends)
    lengths = {*ends, *([(architecture.num_hidden_layers - sum(ends)) // between] if between else [])}
    if len(lengths) > 1:
        found = " and ".join(map(str, sorted(lengths)))
        yield f"--num-layers-per-virtual-pipeline-stage needs stages of one length, and these have {found} layers"
        return
    for length in lengths:
        if length % virtual:
            yield f"--num-layers-per-virtual-pipeline-stage {virtual} does not divide a stage of {length} layers"


def recompute_is_whole(config: Config, _: Architecture) -> Iterator[str]:
    """Full recomputation needs a method and a number of layers, which mean nothing without it."""
    perf = config.perf
    given = perf.recompute_method is not None, perf.recompute_num_layers is not None
    if perf.recompute_granularity == "full" and not all(given):
        yield "--recompute-granularity full needs --recompute-method and --recompute-num-layers, e.g. uniform and 1"
    if perf.recompute_granularity != "full" and any(given):
        yield "--recompute-method and --recompute-num-layers need --recompute-granularity full"


RULES = (
    ranks_divide,
    tensors_divide,
    permutation_is_for_alltoall,
    tensor_parallel_needs_sequence_parallel,
    layers_divide,
    virtual_stages_divide,
    recompute_is_whole,
)
