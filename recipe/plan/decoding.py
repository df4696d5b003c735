"""Seconds that an SGLang engine takes for a token of each sequence that runs, with drafts and without.

E: moments of a rollout; b: sequences of the fullest group of GPUs; B: sequences of the whole engine.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from recipe.config.sglang_rules import size_of
from recipe.config.speculation_rules import REQUESTS_WITH_DRAFTS
from recipe.plan import constants
from recipe.plan.decode_points import EngineKind, MeasuredDecoding
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
    measured: tuple[MeasuredDecoding, ...] = ()
    """Engines of this model on such GPUs; this one is as fast as what was measured of its like."""

    @cached_property
    def kind(self) -> EngineKind:
        """What measured engines must be like."""
        return EngineKind.of(self.engine.architecture, self.engine.config)

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

    def forward(self, batch: np.ndarray, total: np.ndarray, queries: int = 1) -> np.ndarray:
        """[E] seconds of one pass over `queries` tokens of each of [E] b and B sequences, without reading the cache:
        weights are read, products computed, and a layer takes its time however little it has to do."""
        a, layout = self.engine.architecture, self.engine.layout
        apart = constants.DECODE_EXPERTS_APART.at(self.pace)
        missed = (1 - a.num_experts_per_tok / a.n_routed_experts) ** np.maximum(1, total * queries * apart)
        read = layout.pp * (self.other_bytes + (1 - missed) * self.expert_bytes)
        flops = 2 * self.active * batch * queries * self.engine.attention_groups / (layout.tp * layout.pp)
        layer = constants.DECODE_LAYER_S + (layout.tp > 1) * constants.DECODE_EXCHANGE_S.at(self.pace)
        reading = read / (self.gpu.memory_bandwidth * constants.DECODE_SHARE.at(self.pace))
        computing = flops / (self.gpu.flops * constants.DECODE_FLOPS_SHARE)
        return reading + computing + a.num_hidden_layers * layer + constants.DECODE_STEP_S

    def eager(self, batch: np.ndarray) -> np.ndarray:
        """[E] seconds that a pass takes more beyond the CUDA graphs."""
        layers = self.engine.architecture.num_hidden_layers
        return layers * constants.EAGER_LAYER_S.at(self.pace) * (batch > self.graph_batch)

    def read_cache(self, batch: np.ndarray, context: np.ndarray, verifying: bool = False) -> np.ndarray:
        """[E] seconds in which attention reads [E] tokens before each of [E] b sequences."""
        share = constants.CONTEXT_SHARE.at(self.pace)
        if self.engine.config.sglang.args.get("attention_backend") == "triton":
            triton = constants.TRITON_CONTEXT_SHARE.at(self.pace)
            share = constants.TRITON_VERIFY_SHARE if verifying else triton
        size = self.engine.layout.pp * batch * context * self.engine.cache_bytes_per_token
        return size / (self.gpu.memory_bandwidth * share)

    def plain(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds of a token without drafts: the GPUs' time, or their processes' where that is longer."""
        correction = self._correction(drafts=False, batch=batch, context=context)
        return self._plain(batch, total, context) * correction + self.eager(batch)

    def _plain(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        on_gpus = self.forward(batch, total) + self.read_cache(batch, context)
        several = self.engine.layout.tp > 1
        return np.maximum(on_gpus, constants.DECODE_TURN_S.at(self.pace)) if several else on_gpus

    def _correction(self, *, drafts: bool, batch: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] measured time over the planned one, within CUDA graphs; 1 where no engine like this was measured."""
        like = self.kind if drafts else replace(self.kind, draft_steps=0)
        found = [one for one in self.measured if one.points and one.engine == like]
        if not found:
            return np.ones(len(batch))
        one, groups = found[-1], self.engine.attention_groups

        def planned(sequences: int, tokens: int) -> float:
            each, total, before = np.array([sequences / groups]), np.array([sequences]), np.array([float(tokens)])
            seconds = self._verified(each, total, before) if drafts else self._plain(each, total, before)
            return float(seconds[0]) / one.accept_length

        return one.ratio(planned, batch, context)

    @cached_property
    def draft_steps(self) -> int:
        """Tokens that are drafted one after the other; 0: none is."""
        return self.kind.draft_steps

    @property
    def acceptance_length(self) -> float:
        """Tokens that a verification brings a sequence."""
        share = constants.DRAFT_ACCEPTANCE.at(self.pace)
        return float(sum(share**step for step in range(self.draft_steps + 1)))

    def drafted(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds of a token with drafts."""
        correction = self._correction(drafts=True, batch=batch, context=context)
        eager = self.eager(batch) * constants.DRAFT_COST.at(self.pace)
        return (self._verified(batch, total, context) * correction + eager) / self.acceptance_length

    def _verified(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds of the passes that draft, and of the verification of all drafts at once."""
        tokens = size_of(self.engine.config, "speculative_num_draft_tokens", default=self.draft_steps + 1)
        drafted = self.forward(batch, total, tokens) * constants.DRAFT_COST.at(self.pace)
        return drafted + self.read_cache(batch, context, verifying=True)

    @cached_property
    def drafts_up_to(self) -> float:
        """Sequences of an engine up to which it drafts."""
        if not self.draft_steps:
            return 0
        limit = self.engine.config.sglang.speculative_max_batch
        return np.inf if limit is None else limit

    def token(self, batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
        """[E] seconds by which every sequence has got a token more."""
        plain = self.plain(batch, total, context)
        if not self.draft_steps:
            return plain
        return np.where(batch <= self.drafts_up_to, self.drafted(batch, total, context), plain)

    def slots(self, cache_tokens: int, mean_tokens: float) -> int:
        """Sequences that run at once on a group of GPUs: as many as SGLang takes, and its cache has room for."""
        default = REQUESTS_WITH_DRAFTS if self.engine.is_speculative else constants.SGLANG_REQUESTS
        limit = size_of(self.engine.config, "max_running_requests", default=default)
        return max(1, min(limit // self.engine.attention_groups, int(cache_tokens / mean_tokens)))
