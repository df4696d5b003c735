"""GLM-4.7-Flash from token ids to logits in plain torch, by the published equations and Hugging Face's tensor names.

It shares no code with the trainer or with transformers: dense attention, a loop over experts, float64 throughout.

Attention is MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1) without absorbed matrices; the experts are routed as in
DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) with one group; the MTP layer is that report's section 2.2 at depth 1:

    h'_i = M [RMSNorm(h_i); RMSNorm(Emb(t_{i+1}))],  i = 0 .. T - 2
    the logits of t_{i+2} = OutHead(TRM(h')_i)

where the checkpoint fixes what the report leaves open. `eh_proj` takes the embedding's half first (its name's order).
`shared_head.norm` stands before the output head, which is the main model's, as the embedding is. And h_i is the main
model's state *after* its final norm (`model.norm`): that is what SGLang feeds its draft (`Glm4MoeLiteModel.forward`
returns `self.norm(...)`, its LogitsProcessor captures that, and `Glm4MoeLiteModelNextN` applies `hnorm` to it); vLLM
does the same. Row i keeps position i.

Letters: T tokens, H hidden size, N heads, D query/key head size (C without rotary part + R rotary), V value head size,
L key/value latent size, E experts, K experts a token, F width of an MLP.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LATENT_EPSILON = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps is (see `Glm4MoeLiteAttention` in transformers)."""


class Reference:
    """A checkpoint's weights and config.json, and the model's equations over them."""

    def __init__(self, checkpoint: Path) -> None:
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        stored = load_file(checkpoint / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in stored.items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """[T] -> [T, vocabulary]: row i predicts t_{i+1}."""
        return self.hidden(tokens) @ self.weights["lm_head.weight"].T

    def mtp_logits(self, tokens: Tensor) -> Tensor:
        """[T] -> [T - 1, vocabulary]: row i predicts t_{i+2} from h_i and t_{i+1}."""
        layer = f"model.layers.{self.config['num_hidden_layers']}"
        hidden = self.norm(self.hidden(tokens)[:-1], f"{layer}.hnorm")
        embedded = self.norm(self.embed(tokens[1:]), f"{layer}.enorm")
        combined = torch.cat([embedded, hidden], dim=1) @ self.weights[f"{layer}.eh_proj.weight"].T
        output = self.norm(self.block(combined, layer, is_dense=False), f"{layer}.shared_head.norm")
        return output @ self.weights["lm_head.weight"].T

    def hidden(self, tokens: Tensor) -> Tensor:
        """[T] -> [T, H] after the final norm."""
        states = self.embed(tokens)
        for number in range(self.config["num_hidden_layers"]):
            is_dense = number < self.config["first_k_dense_replace"]
            states = self.block(states, f"model.layers.{number}", is_dense)
        return self.norm(states, "model.norm")

    def embed(self, tokens: Tensor) -> Tensor:
        """[T] -> [T, H]."""
        return self.weights["model.embed_tokens.weight"][tokens]

    def block(self, states: Tensor, layer: str, is_dense: bool) -> Tensor:
        """[T, H] -> [T, H]: attention and MLP, each normed first and added to the residual stream."""
        states = states + self.attention(self.norm(states, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        normed = self.norm(states, f"{layer}.post_attention_layernorm")
        return states + (self.mlp if is_dense else self.experts)(normed, f"{layer}.mlp")

    def attention(self, states: Tensor, name: str) -> Tensor:
        """[T, H] -> [T, H]: every token attends to itself and to those before it."""
        config, length = self.config, len(states)
        heads, content = config["num_attention_heads"], config["qk_nope_head_dim"]
        q_latent = self.norm(self.linear(states, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", LATENT_EPSILON)
        query = self.linear(q_latent, f"{name}.q_b_proj").view(length, heads, -1)  # [T, N, D]
        compressed = self.linear(states, f"{name}.kv_a_proj_with_mqa")  # [T, L + R]
        kv_latent, key_rotary = compressed[:, : config["kv_lora_rank"]], compressed[:, config["kv_lora_rank"] :]
        kv_latent = self.norm(kv_latent, f"{name}.kv_a_layernorm", LATENT_EPSILON)
        key_value = self.linear(kv_latent, f"{name}.kv_b_proj").view(length, heads, -1)  # [T, N, C + V]

        one_for_all_heads = self.rotate(key_rotary[:, None]).expand(-1, heads, -1)
        query = torch.cat([query[..., :content], self.rotate(query[..., content:])], dim=-1)
        key = torch.cat([key_value[..., :content], one_for_all_heads], dim=-1)

        scores = torch.einsum("inh,jnh->nij", query, key) / query.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        attended = torch.einsum(
            "nij,jnv->inv", scores.masked_fill(later, -torch.inf).softmax(-1), key_value[..., content:]
        )
        return self.linear(attended.reshape(length, -1), f"{name}.o_proj")

    def rotate(self, states: Tensor) -> Tensor:
        """[T, N, R] -> [T, N, R]: at position p, neighbours (2i, 2i + 1) turn by the angle p * theta^(-2i / R)."""
        width = states.shape[-1]
        theta = float(self.config["rope_parameters"]["rope_theta"])
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(len(states))[:, None, None] * frequencies  # [T, 1, R / 2]
        turned = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
        return torch.view_as_real(turned).flatten(-2)

    def experts(self, states: Tensor, name: str) -> Tensor:
        """[T, H] -> [T, H]: the shared expert and, weighted, the K routed experts whose sigmoid score plus bias is
        largest. The bias has no part in the weights, which are the scores, normalised and scaled."""
        scores = self.linear(states, f"{name}.gate").sigmoid()  # [T, E]
        ranked = scores + self.weights[f"{name}.gate.e_score_correction_bias"]
        chosen = ranked.topk(self.config["num_experts_per_tok"], dim=1).indices  # [T, K]
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = weights / weights.sum(dim=1, keepdim=True) * self.config["routed_scaling_factor"]
        output = self.mlp(states, f"{name}.shared_experts")
        for expert in range(self.config["n_routed_experts"]):
            output = output + weights[:, expert, None] * self.mlp(states, f"{name}.experts.{expert}")
        return output

    def mlp(self, states: Tensor, name: str) -> Tensor:
        """SwiGLU, [T, H] -> [T, F] -> [T, H]."""
        gate, up = self.linear(states, f"{name}.gate_proj"), self.linear(states, f"{name}.up_proj")
        return self.linear(gate * gate.sigmoid() * up, f"{name}.down_proj")

    def linear(self, states: Tensor, name: str) -> Tensor:
        """[T, in] -> [T, out]."""
        return states @ self.weights[f"{name}.weight"].T

    def norm(self, states: Tensor, name: str, epsilon: float | None = None) -> Tensor:
        """RMSNorm over the last axis."""
        epsilon = self.config["rms_norm_eps"] if epsilon is None else epsilon
        scale = (states.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        return states * scale * self.weights[f"{name}.weight"]
