"""Seconds that an SGLang engine takes for a token of each sequence that runs, with drafts and without.

E: moments of a rollout; b: sequences of the fullest group of GPUs; B: sequences of the whole engine.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recipe.config.sglang_rules import size_of
from recipe.config.speculation_rules import REQUESTS_WITH_DRAFTS
from recipe.plan import constants
from recipe.plan.engine import BF16, EngineEstimate
from recipe.plan.flops import active_parameters
from recipe.plan.hardware import Gpu
from recipe.plan.ranges import Pace


@dataclass(frozen=True)
class Decoding:
    """One engine's speed."""

    engine: EngineEstimate
    gpu: Gpu
    pace: Pace

    @cached_property
    def expert_bytes(self) -> float:
        """Of routed experts on one GPU."""
        a, layout = self.engine.architecture, self.engine.layout
        one = BF16 * a.moe_intermediate_size * 3 * a.hidden_size
        return one * a.n_routed_experts * (a.num_hidden_layers - a.first_k_dense_replace) / (layout.tp * layout.pp)

    @cached_property
    def other_bytes(self) -> float:
        """Of all other weights on one GPU; the MTP layer's are read with its drafts."""
        return self.engine.weights - self.expert_bytes

    @cached_property
    def active(self) -> int:
        """Parameters that a token meets."""
        return active_parameters(self.engine.architecture)

    @cached_property
    def graph_batch(self) -> int:
        """Sequences of a group up to which its kernels are started by a CUDA graph."""
        if self.engine.config.sglang.args.get("disable_cuda_graph"):
            return 0
        return size_of(self.engine.config, "cuda_graph_max_bs_decode", default=constants.SGLANG_GRAPH_BATCH)

    def forward(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray, queries: int = 1) -> np.ndarray:
        """[E] seconds of one pass over `queries` tokens of each of [E] b and B sequences with [E] tokens before: what
        is read, what is computed, and the time that a layer takes however little it has to do."""
        a, layout = self.engine.architecture, self.engine.layout
        apart = constants.DECODE_EXPERTS_APART.at(self.pace)
        missed = (1 - a.num_experts_per_tok / a.n_routed_experts) ** np.maximum(1, total * queries * apart)
        read = self.other_bytes + (1 - missed) * self.expert_bytes
        read = read + batch * context * self.engine.cache_bytes_per_token
        flops = 2 * self.active * batch * queries * self.engine.attention_groups / (layout.tp * layout.pp)
        layers = a.num_hidden_layers
        waiting = layers * constants.DECODE_LAYER_S + constants.DECODE_STEP_S
        if layout.tp > 1:
            waiting += layers * constants.DECODE_EXCHANGE_S.at(self.pace) + constants.DECODE_TURN_S.at(self.pace)
        eager = layers * constants.EAGER_LAYER_S.at(self.pace) * (batch > self.graph_batch)
        bandwidth = self.gpu.memory_bandwidth * constants.DECODE_SHARE.at(self.pace)
        computing = flops / (self.gpu.flops * constants.DECODE_FLOPS_SHARE)
        return layout.pp * read / bandwidth + computing + waiting + eager

    @cached_property
    def draft_steps(self) -> int:
        """Tokens that are drafted one after the other; 0: none is."""
        if not self.engine.is_speculative:
            return 0
        return size_of(self.engine.config, "speculative_num_steps", default=constants.SGLANG_DRAFT_STEPS)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a verification brings a sequence."""
        share = constants.DRAFT_ACCEPTANCE.at(self.pace)
        return float(sum(share**step for step in range(self.draft_steps + 1)))

    def drafted(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds of a token with drafts: their passes, and the verification of all of them at once."""
        tokens = size_of(self.engine.config, "speculative_num_draft_tokens", default=self.draft_steps + 1)
        verified = self.forward(batch, total, context, tokens)
        return verified * constants.DRAFT_COST.at(self.pace) / self.acceptance_length

    @cached_property
    def drafts_up_to(self) -> float:
        """Sequences of an engine up to which it drafts."""
        if not self.draft_steps:
            return 0
        limit = self.engine.config.sglang.speculative_max_batch
        return np.inf if limit is None else limit

    def token(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds by which every sequence has got a token more."""
        plain = self.forward(batch, total, context)
        if not self.draft_steps:
            return plain
        return np.where(batch <= self.drafts_up_to, self.drafted(batch, total, context), plain)

    def slots(self, cache_tokens: int, mean_tokens: float) -> int:
        """Sequences that run at once on a group of GPUs: as many as SGLang takes, and its cache has room for."""
        default = REQUESTS_WITH_DRAFTS if self.engine.is_speculative else constants.SGLANG_REQUESTS
        limit = size_of(self.engine.config, "max_running_requests", default=default)
        return max(1, min(limit // self.engine.attention_groups, int(cache_tokens / mean_tokens)))
