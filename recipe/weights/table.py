"""The one table between Hugging Face's tensors of glm4_moe_lite and megatron's parameters.

A megatron parameter is a grid of equally shaped Hugging Face tensors: one for most; gate and up projection for a
SwiGLU's first matrix; experts x (gate, up) for the routed experts. Loading, exporting and streaming to the engine,
under any layout, are derived from the grid. The MTP layer is Hugging Face's layer number num_hidden_layers.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from recipe.config import Architecture


@dataclass(frozen=True)
class ShardCoordinates:
    """Which shard of every tensor a rank holds: its rank and the size along each parallel dimension."""

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor's piece of a local megatron parameter."""

    hf_name: str
    index: tuple[int, ...]
    """Where it lies in the local grid."""
    slices: tuple[slice, ...]
    """Which piece of the whole Hugging Face tensor it is."""


@dataclass(frozen=True)
class Placement:
    """A megatron parameter as a grid of Hugging Face tensors."""

    name: str
    """megatron's name, with the layer's number in the whole model."""
    hf_names: tuple[str, ...]
    """Row by row."""
    hf_shape: tuple[int, ...]
    grid: tuple[int, ...] = ()
    tensor_axis: int | None = None
    """The axis of a Hugging Face tensor that tensor parallelism splits; None where ranks hold copies."""
    is_expert: bool = False
    """Split by expert parallelism along the grid's first axis, and by expert-TP instead of TP."""
    is_fp32: bool = False

    @cached_property
    def elements(self) -> int:
        """Elements of the whole parameter."""
        return len(self.hf_names) * math.prod(self.hf_shape)

    def _tensor_shard(self, at: ShardCoordinates) -> tuple[int, int]:
        return (at.expert_tensor_rank, at.expert_tensor_size) if self.is_expert else (at.tensor_rank, at.tensor_size)

    def _local_grid(self, at: ShardCoordinates) -> tuple[int, ...]:
        return (self.grid[0] // at.expert_size, *self.grid[1:]) if self.is_expert else self.grid

    def slices(self, at: ShardCoordinates) -> tuple[slice, ...]:
        """The piece of each Hugging Face tensor that the rank holds."""
        rank, size = self._tensor_shard(at)
        whole = [slice(0, length) for length in self.hf_shape]
        if self.tensor_axis is not None:
            step = self.hf_shape[self.tensor_axis] // size
            whole[self.tensor_axis] = slice(rank * step, (rank + 1) * step)
        return tuple(whole)

    def local_shape(self, at: ShardCoordinates) -> tuple[int, ...]:
        """Shape of the rank's grid of pieces: a view of the megatron parameter."""
        return (*self._local_grid(at), *(piece.stop - piece.start for piece in self.slices(at)))

    def parts(self, at: ShardCoordinates) -> Iterator[Part]:
        """The pieces that make up the rank's parameter, row by row."""
        slices, local_grid = self.slices(at), self._local_grid(at)
        first = at.expert_rank * math.prod(local_grid) if self.is_expert else 0
        indices = itertools.product(*map(range, local_grid))
        return (Part(self.hf_names[first + row], index, slices) for row, index in enumerate(indices))


def _attention(a: Architecture, layer: str, hf: str) -> list[Placement]:
    heads, hidden = a.num_attention_heads, a.hidden_size
    query, rotary, value = a.qk_nope_head_dim + a.qk_rope_head_dim, a.qk_rope_head_dim, a.v_head_dim
    attention, hf_attention = f"{layer}.self_attention", f"{hf}.self_attn"

    def place(name: str, hf_name: str, shape: tuple[int, ...], axis: int | None = None) -> Placement:
        return Placement(f"{attention}.{name}.weight", (f"{hf_attention}.{hf_name}.weight",), shape, tensor_axis=axis)

    return [
        Placement(f"{layer}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), (hidden,)),
        place("linear_q_down_proj", "q_a_proj", (a.q_lora_rank, hidden)),
        place("q_layernorm", "q_a_layernorm", (a.q_lora_rank,)),
        place("linear_q_up_proj", "q_b_proj", (heads * query, a.q_lora_rank), 0),
        place("linear_kv_down_proj", "kv_a_proj_with_mqa", (a.kv_lora_rank + rotary, hidden)),
        place("kv_layernorm", "kv_a_layernorm", (a.kv_lora_rank,)),
        place("linear_kv_up_proj", "kv_b_proj", (heads * (a.qk_nope_head_dim + value), a.kv_lora_rank), 0),
        place("linear_proj", "o_proj", (hidden, heads * value), 1),
        Placement(f"{layer}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), (hidden,)),
    ]


def _mlp(name: str, hf: str, hidden: int, width: int) -> list[Placement]:
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return [
        Placement(f"{name}.linear_fc1.weight", gate_up, (width, hidden), grid=(2,), tensor_axis=0),
        Placement(f"{name}.linear_fc2.weight", (f"{hf}.down_proj.weight",), (hidden, width), tensor_axis=1),
    ]


def _experts(a: Architecture, name: str, hf: str) -> list[Placement]:
    count, hidden, width = a.n_routed_experts, a.hidden_size, a.moe_intermediate_size
    gate_up = tuple(f"{hf}.experts.{e}.{side}_proj.weight" for e in range(count) for side in ("gate", "up"))
    down = tuple(f"{hf}.experts.{e}.down_proj.weight" for e in range(count))
    return [
        Placement(f"{name}.router.weight", (f"{hf}.gate.weight",), (count, hidden)),
        Placement(f"{name}.router.expert_bias", (f"{hf}.gate.e_score_correction_bias",), (count,), is_fp32=True),
        Placement(f"{name}.experts.linear_fc1", gate_up, (width, hidden), (count, 2), tensor_axis=0, is_expert=True),
        Placement(f"{name}.experts.linear_fc2", down, (hidden, width), (count,), tensor_axis=1, is_expert=True),
        *_mlp(f"{name}.shared_experts", f"{hf}.shared_experts", hidden, width * a.n_shared_experts),
    ]


def _layer(a: Architecture, layer: str, hf: str, is_dense: bool) -> list[Placement]:
    mlp = (
        _mlp(f"{layer}.mlp", f"{hf}.mlp", a.hidden_size, a.intermediate_size)
        if is_dense
        else _experts(a, f"{layer}.mlp", f"{hf}.mlp")
    )
    return _attention(a, layer, hf) + mlp


def _mtp(a: Architecture) -> list[Placement]:
    hf, hidden = f"model.layers.{a.num_hidden_layers}", a.hidden_size
    return [
        Placement("mtp.layers.0.enorm.weight", (f"{hf}.enorm.weight",), (hidden,)),
        Placement("mtp.layers.0.hnorm.weight", (f"{hf}.hnorm.weight",), (hidden,)),
        Placement("mtp.layers.0.eh_proj.weight", (f"{hf}.eh_proj.weight",), (hidden, 2 * hidden), tensor_axis=0),
        *_layer(a, "mtp.layers.0.transformer_layer", hf, is_dense=False),
        Placement("mtp.layers.0.final_layernorm.weight", (f"{hf}.shared_head.norm.weight",), (hidden,)),
    ]


def duplicates(architecture: Architecture) -> dict[str, str]:
    """Copies of other tensors that a checkpoint's MTP layer may carry, by name, and what each is a copy of."""
    hf = f"model.layers.{architecture.num_hidden_layers}"
    return {f"{hf}.embed_tokens.weight": "model.embed_tokens.weight", f"{hf}.shared_head.head.weight": "lm_head.weight"}


def placements(architecture: Architecture, with_mtp: bool) -> dict[str, Placement]:
    """Every parameter of the whole model by megatron's name, in the order of the forward pass."""
    a = architecture
    embedding = (a.vocab_size, a.hidden_size)
    table = [Placement("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), embedding, tensor_axis=0)]
    for number in range(a.num_hidden_layers):
        is_dense = number < a.first_k_dense_replace
        table += _layer(a, f"decoder.layers.{number}", f"model.layers.{number}", is_dense)
    table.append(Placement("decoder.final_layernorm.weight", ("model.norm.weight",), (a.hidden_size,)))
    table.append(Placement("output_layer.weight", ("lm_head.weight",), embedding, tensor_axis=0))
    if with_mtp:
        table += _mtp(a)
    return {placement.name: placement for placement in table}
