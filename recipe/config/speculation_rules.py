"""Rules of speculative decoding: what SGLang asserts when its workers start, told before anything does."""

from collections.abc import Iterator

from recipe.config.architecture import Architecture
from recipe.config.flags import SGLANG_KEY, spell
from recipe.config.schema import Config
from recipe.config.sglang_rules import EngineLayout, size_of

EAGLE = ("EAGLE", "NEXTN")
"""Two names of one algorithm, which drafts with the model's MTP layer."""
REQUESTS_WITH_DRAFTS = 48
"""SGLang's --max-running-requests where it speculates."""
DEFAULT_DRAFT_STEPS = 3
"""SGLang's --speculative-num-steps for this architecture (0.5.21)."""
_WITHOUT_DP_ATTENTION = ("STANDALONE", "NGRAM")
_CHAIN = ("speculative_eagle_topk", "speculative_num_draft_tokens")


def speculation_has_a_draft(config: Config, architecture: Architecture) -> Iterator[str]:
    """EAGLE drafts with the checkpoint's MTP layer, a chain of `steps` tokens with top-k 1."""
    args = config.sglang.args
    if args.get("speculative_algorithm") not in EAGLE:
        return
    if not architecture.num_nextn_predict_layers:
        yield f"--sglang-speculative-algorithm drafts with an MTP layer, and {config.model.hf_checkpoint} has none"
    steps, tokens = args.get("speculative_num_steps"), args.get("speculative_num_draft_tokens")
    if args.get("speculative_eagle_topk") == 1 and isinstance(steps, int) and tokens not in (None, steps + 1):
        yield (
            f"--sglang-speculative-num-draft-tokens {tokens} with {steps} steps and top-k 1: a chain has "
            f"{steps + 1} tokens (steps + 1)"
        )
    given = [name for name in _CHAIN if name in args]
    if steps is None and given:
        flags = " and ".join(f"--sglang-{name.replace('_', '-')}" for name in given)
        yield (
            f"{flags} without --sglang-speculative-num-steps: SGLang chooses all three or none; give the steps too, or "
            "leave all out"
        )


def speculation_fits_the_engine(config: Config, _: Architecture) -> Iterator[str]:
    """Drafts do not go with pipeline stages, and some ways to draft not with DP attention."""
    algorithm = config.sglang.args.get("speculative_algorithm")
    if config.rollout.engine == "embedded" or algorithm is None:
        return
    layout = EngineLayout.of(config)
    if layout.pp > 1:
        yield (
            f"--sglang-speculative-algorithm {algorithm} and --sglang-pp-size {layout.pp} do not go together in "
            "SGLang; leave one of the two out"
        )
    if layout.dp_attention and algorithm in _WITHOUT_DP_ATTENTION:
        yield (
            f"--sglang-speculative-algorithm {algorithm} and --sglang-enable-dp-attention do not go together in "
            "SGLang; leave one of the two out, or draft with EAGLE"
        )


def drafts_keep_their_experts(config: Config, _: Architecture) -> Iterator[str]:
    """With an all-to-all backend SGLang counts no live tokens in EAGLE's drafts, and may send them to wrong experts
    without a word (its issue 40156). Without one, as in the recipes, the drafts' experts are not masked."""
    args = config.sglang.args
    if config.rollout.engine == "embedded" or args.get("speculative_algorithm") not in EAGLE:
        return
    for name in ("moe_a2a_backend", "speculative_moe_a2a_backend"):
        if (backend := args.get(name, "none")) != "none":
            flag = spell(f"{SGLANG_KEY}.{name}", backend)
            yield (
                f"{flag} and --sglang-speculative-algorithm EAGLE do not go together: "
                "SGLang may send the drafts to wrong experts (its issue 40156); leave one of the two out"
            )


def drafts_have_graphs_under_dp_attention(config: Config, _: Architecture) -> Iterator[str]:
    """Where a batch is too large for its CUDA graphs, the GPUs of an engine with DP attention fill their batches up to
    the largest, and EAGLE's drafts on Triton's attention do not expect that: the engine ends (SGLang 0.5.17)."""
    args, layout = config.sglang.args, EngineLayout.of(config)
    if config.rollout.engine == "embedded" or args.get("speculative_algorithm") not in EAGLE or not layout.dp_attention:
        return
    requests = size_of(config, "max_running_requests", default=REQUESTS_WITH_DRAFTS)
    each = -(-requests // layout.dp)
    if args.get("disable_cuda_graph") is True:
        yield (
            "--sglang-disable-cuda-graph, --sglang-enable-dp-attention and --sglang-speculative-algorithm EAGLE do not "
            "go together: SGLang's engine ends with the first batch of which its GPUs have unequal parts"
        )
    elif (largest := size_of(config, "cuda_graph_max_bs_decode", default=each)) < each:
        yield (
            f"--sglang-max-running-requests {requests} are up to {each} on each of the engine's GPUs, and their CUDA "
            f"graphs end at {largest}: with DP attention EAGLE's drafts end the engine beyond it; give "
            f"--sglang-cuda-graph-max-bs-decode {each}, or --sglang-max-running-requests {largest * layout.dp}"
        )


def rejection_sampling_has_one_chain(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang's rejection sampling knows chains of drafts, and draws from a generator that seeds do not rule."""
    args = config.sglang.args
    if args.get("speculative_use_rejection_sampling") is not True:
        return
    flag = "--sglang-speculative-use-rejection-sampling"
    if args.get("speculative_algorithm") not in (*EAGLE, "EAGLE3"):
        yield f"{flag} needs --sglang-speculative-algorithm EAGLE"
    if "speculative_num_steps" in args and args.get("speculative_eagle_topk") != 1:
        yield f"{flag} needs --sglang-speculative-eagle-topk 1"
    if args.get("enable_deterministic_inference") is True:
        yield f"{flag} and --sglang-enable-deterministic-inference do not go together in SGLang; leave one of them out"


def speculation_can_be_limited(config: Config, _: Architecture) -> Iterator[str]:
    """SGLang changes the number of draft tokens by batch size for EAGLE with one chain, without DP attention."""
    args = config.sglang.args
    if config.sglang.speculative_max_batch is None:
        return
    if args.get("speculative_algorithm") not in EAGLE:
        yield "--speculative-max-batch limits --sglang-speculative-algorithm EAGLE, which is not given"
    if args.get("speculative_eagle_topk", 1) != 1:
        yield "--speculative-max-batch needs --sglang-speculative-eagle-topk 1: SGLang turns only chains of drafts off"
    if EngineLayout.of(config).dp_attention:
        yield (
            "--speculative-max-batch and --sglang-enable-dp-attention do not go together: the engine's DP ranks would "
            "decide differently; leave one of the two out"
        )
    if "speculative_adaptive" in args or "speculative_adaptive_config" in args:
        yield "--speculative-max-batch says what --sglang-speculative-adaptive-config says; leave one of the two out"


RULES = (
    speculation_has_a_draft,
    speculation_fits_the_engine,
    drafts_keep_their_experts,
    drafts_have_graphs_under_dp_attention,
    rejection_sampling_has_one_chain,
    speculation_can_be_limited,
)
