"""Glm4MoeLiteForCausalLM of transformers with its weights laid out for few large matrix products.

The parameters of the transformers model stay what they are by name, shape and value; their storage is rearranged so
that several of them lie side by side and multiply as one matrix. There is one copy of every weight: whoever writes
a parameter writes what the engine computes with, so nothing can go stale.

Letters: H hidden, A heads, N and P a head's dimensions without and with position, V value head, L latent query,
C latent key and value, E routed experts, I an expert's hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

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


_SUPPORTED = {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_interleave": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def build_model(config: Glm4MoeLiteConfig) -> Glm4MoeLiteForCausalLM:
    """The model in float32, its weights not yet loaded. Raises UserError for an architecture the engine cannot run."""
    actual = config.to_dict()
    wrong = [f"{name} = {actual[name]}" for name, value in _SUPPORTED.items() if actual[name] != value]
    if config.rope_parameters["rope_type"] != "default":
        wrong.append(f"rope_type = {config.rope_parameters['rope_type']}")
    if wrong:
        raise UserError(f"the embedded engine cannot run {', '.join(wrong)}; use --rollout-engine sglang")
    return Glm4MoeLiteForCausalLM(config).float().eval().requires_grad_(False)


def fuse(model: Glm4MoeLiteForCausalLM) -> list[Layer]:
    """Rearranges the storage of the model's parameters; the tensors returned share it with them."""
    weights: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return [
        _LayerFuser(model.config, weights, f"model.layers.{number}").fuse(sparse=kind == "sparse")
        for number, kind in enumerate(model.config.mlp_layer_types)
    ]


class _LayerFuser:
    def __init__(self, config: Glm4MoeLiteConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._config = config
        self._weights = weights
        self._prefix = prefix

    def fuse(self, *, sparse: bool) -> Layer:
        epsilon = self._config.rms_norm_eps
        return Layer(
            input_norm=Norm(self._data("input_layernorm.weight"), epsilon),
            attention=self._attention(),
            post_attention_norm=Norm(self._data("post_attention_layernorm.weight"), epsilon),
            mlp=self._experts() if sparse else self._mlp(),
        )

    def _weight(self, name: str) -> Tensor:
        return self._weights[f"{self._prefix}.{name}"]

    def _data(self, name: str) -> Tensor:
        return self._weight(name).data

    def _side_by_side(self, *names: str) -> Tensor:
        """The matrices `names` as one, above each other, in shared storage."""
        parts = [self._weight(name) for name in names]
        whole = torch.cat(parts)
        for part, data in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = data
        return whole

    def _attention(self) -> Attention:
        config = self._config
        kv_b = self._data("self_attn.kv_b_proj.weight").view(config.num_attention_heads, -1, config.kv_lora_rank)
        k_b, v_b = kv_b.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return Attention(
            q_kv_a=self._side_by_side("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
            q_norm=Norm(self._data("self_attn.q_a_layernorm.weight"), LATENT_EPSILON),
            kv_norm=Norm(self._data("self_attn.kv_a_layernorm.weight"), LATENT_EPSILON),
            q_b=self._data("self_attn.q_b_proj.weight"),
            k_b=k_b,
            v_b=v_b.transpose(1, 2),
            o=self._data("self_attn.o_proj.weight"),
        )

    def _mlp(self) -> Mlp:
        gate_up = self._side_by_side("mlp.gate_proj.weight", "mlp.up_proj.weight")
        return Mlp(gate_up, self._data("mlp.down_proj.weight"))

    def _experts(self) -> Experts:
        routed_gate_up, routed_down = self._weight("mlp.experts.gate_up_proj"), self._weight("mlp.experts.down_proj")
        gate, up = (
            self._weight("mlp.shared_experts.gate_proj.weight"),
            self._weight("mlp.shared_experts.up_proj.weight"),
        )
        shared_down = self._weight("mlp.shared_experts.down_proj.weight")
        count, hidden, inner = routed_down.shape
        gate_up = torch.cat([routed_gate_up.reshape(-1, hidden), gate, up])
        down = torch.cat([routed_down.permute(1, 0, 2).reshape(hidden, -1), shared_down], dim=1)
        by_expert = gate_up.view(count + 1, 2 * inner, hidden)
        routed_gate_up.data = by_expert[:count]
        gate.data, up.data = by_expert[count].chunk(2)
        down_by_expert = down.view(hidden, count + 1, inner).permute(1, 0, 2)
        routed_down.data, shared_down.data = down_by_expert[:count], down_by_expert[count]
        return Experts(self._data("mlp.gate.weight"), self._data("mlp.gate.e_score_correction_bias"), gate_up, down)
