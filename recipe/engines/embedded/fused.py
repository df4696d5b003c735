"""The policy's weights, laid out for few large matrix products.

Several matrices of a checkpoint lie side by side and multiply as one. There is one copy of every weight: what a
checkpoint names is a view of where the engine computes, so that whoever writes it writes what the engine computes with,
and nothing can go stale.

Letters: H hidden, A heads, N and P a head's dimensions without and with position, V value head, L latent query,
C latent key and value, E routed experts, I an expert's hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recipe.config import Architecture
from recipe.system.errors import UserError

LATENT_EPSILON = 1e-6
"""Epsilon of the two norms in the latent space; no configuration names it."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (x * mean_square.add_(self.epsilon).rsqrt_()).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head latent attention; queries and values go through the latent space (DeepSeek-V2, arXiv 2405.04434)."""

    q_kv_a: Tensor
    """[L + C + P, H]: both down projections."""
    q_norm: Norm
    kv_norm: Norm
    q_b: Tensor
    """[A * (N + P), L]"""
    k_b: Tensor
    """[A, N, C]: latent to keys."""
    v_b: Tensor
    """[A, C, V]: latent to values."""
    o: Tensor
    """[H, A * V]"""


@dataclass(frozen=True, slots=True)
class Mlp:
    """A dense layer's MLP."""

    gate_up: Tensor
    """[2 * intermediate, H]"""
    down: Tensor
    """[H, intermediate]"""


@dataclass(frozen=True, slots=True)
class Experts:
    """All experts of a layer; the last is the shared one."""

    router: Tensor
    """[E, H]"""
    router_bias: Tensor
    """[E], for the choice only."""
    gate_up: Tensor
    """[(E + 1) * 2 * I, H]: gate and up alternate by expert."""
    down: Tensor
    """[H, (E + 1) * I]"""


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Norm
    attention: Attention
    post_attention_norm: Norm
    mlp: Mlp | Experts


_SUPPORTED = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
"""Of what the trainer can do, what this engine can."""


class FusedModel:
    """The weights in float32, and a view of each by its name in a checkpoint."""

    def __init__(self, architecture: Architecture) -> None:
        """What the weights are is not set. Raises UserError for an architecture that the engine cannot run."""
        actual = {name: getattr(architecture, name) for name in _SUPPORTED}
        wrong = [f"{name} = {actual[name]}" for name, value in _SUPPORTED.items() if actual[name] != value]
        if wrong:
            raise UserError(f"the embedded engine cannot run {', '.join(wrong)}; use --rollout-engine sglang")
        self.architecture = architecture
        self.parts: dict[str, Tensor] = {}
        """Checkpoint name -> view."""
        vocabulary, hidden = architecture.vocab_size, architecture.hidden_size
        self.embedding = self._new("model.embed_tokens.weight", vocabulary, hidden)
        self.layers = [
            self._layer(f"model.layers.{number}", has_experts=bool(kind))
            for number, kind in enumerate(architecture.moe_layer_freq)
        ]
        self.norm = Norm(self._new("model.norm.weight", hidden), architecture.rms_norm_eps)
        self.head = self._new("lm_head.weight", vocabulary, hidden)

    def _new(self, name: str, *shape: int) -> Tensor:
        self.parts[name] = torch.empty(shape)
        return self.parts[name]

    def _stacked(self, rows: dict[str, int], width: int) -> Tensor:
        """The matrices of so many `rows` each as one, above each other."""
        whole = torch.empty(sum(rows.values()), width)
        self.parts.update(zip(rows, whole.split(list(rows.values())), strict=True))
        return whole

    def _layer(self, prefix: str, *, has_experts: bool) -> Layer:
        hidden, epsilon = self.architecture.hidden_size, self.architecture.rms_norm_eps
        return Layer(
            input_norm=Norm(self._new(f"{prefix}.input_layernorm.weight", hidden), epsilon),
            attention=self._attention(f"{prefix}.self_attn"),
            post_attention_norm=Norm(self._new(f"{prefix}.post_attention_layernorm.weight", hidden), epsilon),
            mlp=self._experts(f"{prefix}.mlp") if has_experts else self._mlp(f"{prefix}.mlp"),
        )

    def _attention(self, prefix: str) -> Attention:
        a = self.architecture
        heads, latent, nope, rope = a.num_attention_heads, a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim
        down = {f"{prefix}.q_a_proj.weight": a.q_lora_rank, f"{prefix}.kv_a_proj_with_mqa.weight": latent + rope}
        kv_b = self._new(f"{prefix}.kv_b_proj.weight", heads * (nope + a.v_head_dim), latent)
        k_b, v_b = kv_b.view(heads, -1, latent).split([nope, a.v_head_dim], dim=1)
        return Attention(
            q_kv_a=self._stacked(down, a.hidden_size),
            q_norm=Norm(self._new(f"{prefix}.q_a_layernorm.weight", a.q_lora_rank), LATENT_EPSILON),
            kv_norm=Norm(self._new(f"{prefix}.kv_a_layernorm.weight", latent), LATENT_EPSILON),
            q_b=self._new(f"{prefix}.q_b_proj.weight", heads * (nope + rope), a.q_lora_rank),
            k_b=k_b,
            v_b=v_b.transpose(1, 2),
            o=self._new(f"{prefix}.o_proj.weight", a.hidden_size, heads * a.v_head_dim),
        )

    def _mlp(self, prefix: str) -> Mlp:
        hidden, inner = self.architecture.hidden_size, self.architecture.intermediate_size
        rows = {f"{prefix}.gate_proj.weight": inner, f"{prefix}.up_proj.weight": inner}
        return Mlp(self._stacked(rows, hidden), self._new(f"{prefix}.down_proj.weight", hidden, inner))

    def _experts(self, prefix: str) -> Experts:
        a = self.architecture
        count, hidden, inner = a.n_routed_experts, a.hidden_size, a.moe_intermediate_size
        names = [*(f"{prefix}.experts.{number}" for number in range(count)), f"{prefix}.shared_experts"]
        kinds = [f"{name}.{kind}_proj.weight" for name in names for kind in ("gate", "up")]
        down = torch.empty(hidden, (count + 1) * inner)
        self.parts.update(zip([f"{name}.down_proj.weight" for name in names], down.split(inner, dim=1), strict=True))
        return Experts(
            router=self._new(f"{prefix}.gate.weight", count, hidden),
            router_bias=self._new(f"{prefix}.gate.e_score_correction_bias", count),
            gate_up=self._stacked(dict.fromkeys(kinds, inner), hidden),
            down=down,
        )
