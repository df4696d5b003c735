"""What an SGLang engine takes on each of its GPUs (0.5.21; its own reserve formulas where it has some)."""

from dataclasses import dataclass
from functools import cache, cached_property

from recipe.config import Architecture, Config
from recipe.config.sglang_rules import EngineLayout, size_of
from recipe.plan import constants
from recipe.plan.hardware import Gpu
from recipe.plan.shards import Part, part_of, table_of
from recipe.system.errors import UserError
from recipe.weights.table import Placement

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU of an engine that generates. The cache takes what `mem_fraction_static` leaves of the free
    memory after the weights."""

    weights: int
    kv_cache: int
    cuda_graphs: int
    activations: int
    tokens: int
    """Tokens that the cache holds, of the sequences of this GPU."""
    needed_tokens: int
    """Tokens of as many of the longest sequences as run at once on this GPU."""


def static_fraction(config: Config) -> float:
    """mem_fraction_static: the share of a GPU's free memory that weights and cache get. Raises UserError if it is no
    share."""
    given = config.sglang.args.get("mem_fraction_static", constants.SGLANG_FRACTION)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1:
        raise UserError(f"--sglang-mem-fraction-static must be a share between 0 and 1, not {given!r}")
    return float(given)


def rollouts_at_once(config: Config) -> int:
    """Rollouts of which responses may be under way at the same time: where responses go on with new weights, so many as
    are begun before the first of them is learned from."""
    settings = config.rollout
    return 1 if settings.update_weight_in_flight is None else 1 + settings.staleness


@dataclass(frozen=True)
class EngineEstimate:
    """One engine's GPUs, which are all alike."""

    architecture: Architecture
    config: Config
    longest_sample: int

    @cached_property
    def layout(self) -> EngineLayout:
        return EngineLayout.of(self.config)

    @property
    def is_speculative(self) -> bool:
        return "speculative_algorithm" in self.config.sglang.args

    @property
    def attention_groups(self) -> int:
        """Groups of GPUs that hold different sequences."""
        return self.layout.groups

    @cached_property
    def weights(self) -> int:
        """Bytes of weights: experts over all GPUs (whole ones over EP, the rest by width), attention, embedding and
        output head over the GPUs that share sequences, dense MLPs as --sglang-moe-dense-tp-size says. A draft worker
        loads an embedding and an output head of its own, whose memory it keeps."""
        return _weights(self.architecture, self.layout, self.is_speculative)

    @property
    def cache_bytes_per_token(self) -> int:
        """A token's bytes in the caches of all layers: the latent and the rotary key, whole on every GPU (DeepSeek-V2,
        arXiv:2405.04434)."""
        a = self.architecture
        layers = a.num_hidden_layers + (a.num_nextn_predict_layers if self.is_speculative else 0)
        return layers // self.layout.pp * (a.kv_lora_rank + a.qk_rope_head_dim) * BF16

    def running(self) -> int:
        """Sequences that generate at once on one GPU."""
        limit = self.config.sglang.args.get("max_running_requests")
        share = -(-self.config.samples_per_rollout * rollouts_at_once(self.config) // max(1, self.config.num_engines))
        whole = min(limit, share) if isinstance(limit, int) else share
        return -(-whole // self.attention_groups)

    def memory(self, gpu: Gpu) -> EngineMemory:
        """On a GPU that has nothing else when the engine starts."""
        layout, args = self.layout, self.config.sglang.args
        chunk = size_of(self.config, "chunked_prefill_size", default=constants.SGLANG_CHUNK)
        chunk = max(chunk // self.attention_groups, constants.SGLANG_LEAST_CHUNK)
        activations = constants.SGLANG_META + chunk * constants.SGLANG_PER_TOKEN
        activations += layout.tp * layout.pp * constants.SGLANG_PER_8_GPUS // 8
        if self.is_speculative:
            activations += constants.SGLANG_DRAFT
        batch = size_of(self.config, "cuda_graph_max_bs_decode", default=constants.SGLANG_GRAPH_BATCH)
        graphs = constants.SGLANG_GRAPHS + batch * constants.SGLANG_GRAPHS_PER_SEQUENCE
        if args.get("disable_cuda_graph"):
            graphs = 0
        weights = self.weights
        static = int(static_fraction(self.config) * (gpu.memory - constants.CUDA_CONTEXT))
        cache = max(0, static - weights)
        if "max_total_tokens" in args:
            cache = min(cache, size_of(self.config, "max_total_tokens", default=0) * self.cache_bytes_per_token)
        return EngineMemory(
            weights=weights,
            kv_cache=cache,
            cuda_graphs=graphs,
            activations=activations,
            tokens=cache // self.cache_bytes_per_token,
            needed_tokens=self.running() * self.longest_sample,
        )


@cache
def _weights(architecture: Architecture, layout: EngineLayout, is_speculative: bool) -> int:
    """Each layout's once: whoever tunes asks for few of them, hundreds of times."""
    experts, total = architecture.n_routed_experts, 0.0
    for placement in table_of(architecture, is_speculative).values():
        if placement.is_expert:
            total += placement.elements * (experts + layout.redundant_experts) / experts / layout.tp
        else:
            twice = is_speculative and part_of(placement.name) in (Part.EMBEDDING, Part.OUTPUT_HEAD)
            total += (1 + twice) * placement.elements / _gpus_that_split(placement, layout)
    return int(total / layout.pp) * BF16


def _gpus_that_split(placement: Placement, layout: EngineLayout) -> int:
    """GPUs among which SGLang splits a tensor that is no expert's; where it keeps it whole, one."""
    if placement.tensor_axis is None:
        return 1
    if "self_attention" in placement.name:
        return layout.attention_tp
    if "shared_experts" in placement.name:
        return layout.shared_expert_tp
    of_parts = {
        Part.EMBEDDING: layout.attention_tp,
        Part.OUTPUT_HEAD: layout.head_tp,
        Part.DENSE_MLP: layout.dense_tp,
    }
    return of_parts.get(part_of(placement.name), 1)
