"""What the backward pass keeps of a forward pass over one microbatch on one rank, and what it needs beside.

Counted from the code in `recipe/megatron`, tensor by tensor; tests compare it with what autograd really saves.

Letters: T tokens of the pack on the rank (S of them between tensor-parallel regions: T / TP), R rows of (token, expert)
pairs, K keys, N heads of the rank, H hidden size, F an MLP's width.
"""

from dataclasses import dataclass
from functools import cached_property

from recipe.config import Architecture, Config
from recipe.plan import constants
from recipe.plan.shards import Layout, StageShard

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Pack:
    """The largest microbatch."""

    tokens: int
    """On one rank."""
    asked: int
    """Tokens whose log-probabilities are asked for on one rank."""
    longest: int
    """Tokens of the longest sequence in it."""
    keys: int
    """Keys that the pack's queries see on this rank, counted once for every segment that sees them."""

    @classmethod
    def largest(cls, config: Config, longest_sample: int) -> "Pack":
        """The largest pack that a run makes if its longest sample has so many tokens."""
        perf = config.perf
        size = perf.context_parallel_size
        bound = longest_sample * perf.micro_batch_size
        if perf.use_dynamic_batch_size and perf.max_tokens_per_gpu:
            bound = max(perf.max_tokens_per_gpu * size, longest_sample)
        unit = 2 * size * perf.tensor_model_parallel_size if size > 1 else perf.tensor_model_parallel_size
        tokens = -(-bound // unit) * unit // size
        # A context-parallel rank's two chunks of a sequence see 2 * CP + 1 of its 2 * CP chunks between them.
        keys = tokens if size == 1 else tokens * (2 * size + 1) // 2
        return cls(tokens=tokens, asked=tokens, longest=min(longest_sample, bound), keys=keys)


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank at the worst moment of a forward and backward pass."""

    kept: int
    """Bytes that the microbatches in flight keep for their backward passes."""
    log_probs: int
    """While the backward pass begins: the logits of a chunk, and gradients beside them."""
    layer: int
    """While it goes through the layer that takes most: what is recomputed, and gradients."""


@dataclass(frozen=True)
class ActivationModel:
    """Counts for one architecture, layout and kind of device."""

    architecture: Architecture
    config: Config
    pack: Pack
    on_gpu: bool

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.config)

    @property
    def width(self) -> int:
        """Bytes of an activation's element."""
        return 2 if self.config.model.bf16 else FP32

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states between two layers, [S, H]."""
        return self.pack.tokens // self.layout.tp * self.architecture.hidden_size * self.width

    @property
    def rows(self) -> int:
        """R, of the busiest rank."""
        layout = self.layout
        rows = self.pack.tokens // layout.tp * self.architecture.num_experts_per_tok * layout.etp
        return int(rows * constants.EXPERT_IMBALANCE) if layout.ep > 1 else rows

    def _norm(self, elements: int) -> int:
        """Input and output; where its kernel is not fused, the normed input too."""
        return elements * self.width * (2 if self.on_gpu else 3)

    def attention(self) -> int:
        """Kept by a layer's first half, its input included."""
        a, tokens, layout = self.architecture, self.pack.tokens, self.layout
        inner, heads = tokens // layout.tp, a.num_attention_heads // layout.tp
        head = a.qk_nope_head_dim + a.qk_rope_head_dim
        latents = self._norm(inner * a.q_lora_rank) + self._norm(inner * a.kv_lora_rank)
        latents += inner * a.qk_rope_head_dim * self.width
        queries, keys = tokens * heads * head * self.width, self.pack.keys * heads * head * self.width
        values = tokens * heads * a.v_head_dim * self.width
        kept = queries + 2 * keys
        if self.config.perf.attention_backend == "unfused":
            rounded = self.width < FP32
            scores = heads * (FP32 + rounded * self.width) + 1
            kept += tokens * self.pack.longest * scores + values + rounded * 2 * (queries + keys)
        else:
            kept += queries + tokens * heads * FP32 + (values if a.v_head_dim != head else 0)
        rotary = tokens * a.qk_rope_head_dim * FP32
        return self._norm(inner * a.hidden_size) + latents + kept + rotary

    def _gated(self, width: int) -> int:
        """megatron's SwiGLU keeps both projections, the gate's activation, the other half once more, and their
        product."""
        return self.pack.tokens * 5 * width // self.layout.tp * self.width

    def dense_mlp(self) -> int:
        """Kept by the second half of a dense layer."""
        a = self.architecture
        return self._norm(self.pack.tokens // self.layout.tp * a.hidden_size) + self._gated(a.intermediate_size)

    def experts(self) -> int:
        """Kept by the second half of an expert layer."""
        a, inner = self.architecture, self.pack.tokens // self.layout.tp
        width = a.moe_intermediate_size // self.layout.etp
        of_rows = self.rows * (a.hidden_size + (3 if self.on_gpu else 5) * width) * self.width
        router = inner * a.n_routed_experts * (2 * FP32 + 1) + inner * a.num_experts_per_tok * (2 * INT64 + 2 * FP32)
        shared = self._gated(a.shared_expert_intermediate_size)
        return self._norm(inner * a.hidden_size) + of_rows + router + shared

    def layer(self, number: int) -> int:
        """Kept by a decoder layer, its input included."""
        dense = number < self.architecture.first_k_dense_replace
        return self.attention() + (self.dense_mlp() if dense else self.experts())

    def gradients_of_layer(self, number: int) -> int:
        """Gradients that a layer's backward pass holds at once."""
        a, tokens, layout = self.architecture, self.pack.tokens, self.layout
        heads, head = a.num_attention_heads // layout.tp, a.qk_nope_head_dim + a.qk_rope_head_dim
        attention = (tokens * 2 + self.pack.keys * 2) * heads * head * self.width
        if number < a.first_k_dense_replace:
            mlp = tokens * 2 * a.intermediate_size // layout.tp * self.width
        else:
            width = a.hidden_size if layout.ep > 1 else a.moe_intermediate_size // layout.etp
            mlp = self.rows * (a.hidden_size + width) * self.width
        return 2 * self.hidden + max(attention, mlp)

    def log_probs(self) -> int:
        """Kept for the log-probabilities: the asked rows, and a chunk's logits."""
        a, asked = self.architecture, self.pack.asked
        chunk = min(asked, self.config.perf.log_probs_chunk_size)
        vocabulary = a.vocab_size // self.layout.tp
        return (asked * a.hidden_size + chunk * vocabulary) * self.width + asked * 4 * FP32

    def kept_by(self, layers: tuple[int, ...]) -> int:
        """Kept by a stage's layers of one microbatch."""
        perf = self.config.perf
        group = perf.recompute_num_layers or 1
        if perf.recompute_granularity != "full":
            return sum(map(self.layer, layers))
        if perf.recompute_method == "block":
            return self.hidden * min(group, len(layers)) + sum(map(self.layer, layers[group:]))
        return self.hidden * -(-len(layers) // group)

    def _recomputed(self, layers: tuple[int, ...]) -> int:
        """The most that one recomputed group of layers keeps, and its gradients."""
        perf = self.config.perf
        if perf.recompute_granularity != "full":
            return max(map(self.gradients_of_layer, layers))
        group = 1 if perf.recompute_method == "block" else perf.recompute_num_layers or 1
        groups = [layers[start : start + group] for start in range(0, len(layers), group)]
        return max(sum(map(self.layer, one)) + max(map(self.gradients_of_layer, one)) for one in groups)

    def mtp(self) -> int:
        """Kept by the MTP layer where it is trained: its two normed inputs, joined, a layer's own, and logits."""
        if not self.config.mtp.enable_mtp_training:
            return 0
        perf, number = self.config.perf, self.architecture.num_hidden_layers - 1
        layer = self.hidden if perf.recompute_granularity == "full" else self.layer(number) + 5 * self.hidden
        return 3 * self.hidden + layer + self.log_probs()

    def mtp_layer(self) -> int:
        """While the backward pass goes through the MTP layer where it is trained: what it keeps or recomputes, and
        gradients."""
        if not self.config.mtp.enable_mtp_training:
            return 0
        number = self.architecture.num_hidden_layers - 1
        return 9 * self.hidden + self.layer(number) + self.gradients_of_layer(number)

    def of_stage(self, shard: StageShard, in_flight: int) -> Activations:
        """At the worst moment of a rank of this stage, with so many microbatches in flight."""
        kept = in_flight * (self.kept_by(shard.layers) // len(shard.chunks))
        log_probs, width = 0, self.architecture.hidden_size * self.width
        if shard.is_last:
            kept += self._norm(self.hidden // self.width) - self.hidden
            # The gradient of the asked rows, or before it the last norm's output. The MTP layer's turn is the first.
            of_mtp = max(self.mtp() + max(self.hidden, self.pack.asked * width), self.mtp_layer())
            log_probs = self.log_probs() + of_mtp
        return Activations(kept=kept, log_probs=log_probs, layer=self._recomputed(shard.layers))


def microbatches_in_flight(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Forward passes whose backward pass is still to come, at most, on a stage: megatron's one-forward-one-backward
    schedules (arXiv:2104.04473), counted in chunks."""
    if stages == 1:
        return 1
    if chunks == 1:
        return min(stages - stage, microbatches)
    return min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, microbatches * chunks)
