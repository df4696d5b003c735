"""Glm4MoeLiteForCausalLM of transformers with its weights laid out for few large matrix products.

The parameters of the transformers model stay what they are by name, shape and value; their storage is rearranged so
that several of them lie side by side and multiply as one matrix. There is one copy of every weight: whoever writes
a parameter writes what the engine computes with, so nothing can go stale.

Letters: H hidden, A heads, N and P the head's dimensions without and with position, V value head, C latent key/value,
E routed experts, I expert hidden, J = (E + 1) * I with the shared expert as one more.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from recipe.errors import UserError


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module) -> "Norm":
        return cls(module.weight.data, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """Multi-head latent attention, queries and values taken through the latent space (DeepSeek-V2, arXiv 2405.04434)."""

    q_kv_a: Tensor
    """[q_lora + C + P, H]: both down projections."""
    q_norm: Norm
    kv_norm: Norm
    q_b: Tensor
    """[A * (N + P), q_lora]"""
    k_b: Tensor
    """[A, N, C]: latent to keys."""
    v_b: Tensor
    """[A, C, V]: latent to values."""
    o: Tensor
    """[H, A * V]"""


@dataclass(frozen=True, slots=True)
class FusedMlp:
    """A dense MLP, or all experts at once."""

    gate_up: Tensor
    """[2 * J, H]; experts: gate and up alternate by expert."""
    down: Tensor
    """[H, J]"""
    router: Tensor | None
    """[E, H]; None: dense."""
    router_bias: Tensor | None
    """[E], for the choice only."""


@dataclass(frozen=True, slots=True)
class FusedLayer:
    input_norm: Norm
    attention: FusedAttention
    post_attention_norm: Norm
    mlp: FusedMlp


def build_model(config: Glm4MoeLiteConfig) -> Glm4MoeLiteForCausalLM:
    """The model in float32, its weights not yet loaded. Raises UserError for an architecture the engine cannot run."""
    wrong = [name for name, value in _SUPPORTED.items() if getattr(config, name) != value]
    if config.rope_parameters["rope_type"] != "default":
        wrong.append("rope_parameters.rope_type")
    if wrong:
        raise UserError(
            f"the embedded engine does not know this model's {', '.join(wrong)}; use --rollout-engine sglang"
        )
    return Glm4MoeLiteForCausalLM(config).float().eval().requires_grad_(False)


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


def fuse(model: Glm4MoeLiteForCausalLM) -> list[FusedLayer]:
    """Rearranges the storage of the model's parameters; the tensors returned share it with them."""
    return [
        FusedLayer(
            input_norm=Norm.of(layer.input_layernorm),
            attention=_fuse_attention(layer.self_attn),
            post_attention_norm=Norm.of(layer.post_attention_layernorm),
            mlp=_fuse_experts(layer.mlp) if kind == "sparse" else _fuse_mlp(layer.mlp),
        )
        for layer, kind in zip(model.model.layers, model.config.mlp_layer_types, strict=True)
    ]


def _fuse_attention(attention: nn.Module) -> FusedAttention:
    q_a, kv_a = attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight
    q_kv_a = torch.cat([q_a, kv_a])
    q_a.data, kv_a.data = q_kv_a[: len(q_a)], q_kv_a[len(q_a) :]
    kv_b = attention.kv_b_proj.weight.data.view(attention.num_heads, -1, attention.kv_lora_rank)
    return FusedAttention(
        q_kv_a=q_kv_a,
        q_norm=Norm.of(attention.q_a_layernorm),
        kv_norm=Norm.of(attention.kv_a_layernorm),
        q_b=attention.q_b_proj.weight.data,
        k_b=kv_b[:, : attention.qk_nope_head_dim],
        v_b=kv_b[:, attention.qk_nope_head_dim :].transpose(1, 2),
        o=attention.o_proj.weight.data,
    )


def _fuse_mlp(mlp: nn.Module) -> FusedMlp:
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    gate_up = torch.cat([gate, up])
    gate.data, up.data = gate_up.chunk(2)
    return FusedMlp(gate_up=gate_up, down=mlp.down_proj.weight.data, router=None, router_bias=None)


def _fuse_experts(moe: nn.Module) -> FusedMlp:
    """The shared expert becomes expert E."""
    experts, shared = moe.experts, moe.shared_experts
    routed_gate_up, routed_down = experts.gate_up_proj, experts.down_proj
    count, hidden, inner = routed_down.shape
    gate_up = torch.cat([routed_gate_up.reshape(-1, hidden), shared.gate_proj.weight, shared.up_proj.weight])
    down = torch.cat([routed_down.permute(1, 0, 2).reshape(hidden, -1), shared.down_proj.weight], dim=1)
    experts_gate_up = gate_up.view(count + 1, 2 * inner, hidden)
    experts_down = down.view(hidden, count + 1, inner).permute(1, 0, 2)
    routed_gate_up.data, routed_down.data = experts_gate_up[:count], experts_down[:count]
    shared.gate_proj.weight.data, shared.up_proj.weight.data = experts_gate_up[count].chunk(2)
    shared.down_proj.weight.data = experts_down[count]
    return FusedMlp(gate_up, down, moe.gate.weight.data, moe.gate.e_score_correction_bias)
