"""Which slice of a checkpoint's tensor each rank of an SGLang engine holds, and in which tensor of SGLang's.

The table is how SGLang (0.5.17 to 0.5.21) lays out glm4_moe_lite and its draft model. Tensor parallelism splits rows or
columns; DP attention splits attention and embedding over fewer ranks, those of one of its groups; expert parallelism
deals out whole experts, of which the redundant ones come after all others and in the same order. (On a CPU alone SGLang
pads MLPs that would have other than a multiple of 32 columns a rank; that is not known here.)
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor
from torch.nn.functional import pad

from recipe.config.sglang_rules import EngineLayout

VOCABULARY_MULTIPLE = 64
"""SGLang pads embedding and output head with zeros to a multiple of as many rows."""

ROWS, COLUMNS = 0, 1


class Among(StrEnum):
    """Which ranks of an engine divide a tensor among them; each other such set of ranks holds the same again."""

    NONE = "none"
    ATTENTION = "a DP group"
    DENSE = "all, or none with moe_dense_tp_size 1"
    SHARED_EXPERTS = "all, or none with a backend that sends tokens"
    HEAD = "all, or a DP group with enable_dp_lm_head"
    EXPERTS = "those with the same experts"


@dataclass(frozen=True, slots=True)
class Rule:
    """What SGLang makes of tensors whose name in a checkpoint ends with `pattern`."""

    pattern: str
    name: str
    """The end of SGLang's name."""
    axis: int = ROWS
    """Along which it is divided."""
    among: Among = Among.NONE
    part: int = 0
    """Its number among the `parts` that SGLang puts one after the other, for each expert."""
    parts: int = 1
    is_vocabulary: bool = False


_EXPERT, _SHARED = r"mlp\.experts\.(?P<expert>\d+)", r"mlp\.shared_experts"
_FUSED_A = "self_attn.fused_qkv_a_proj_with_mqa.weight"
_RULES = (
    Rule(r"embed_tokens\.weight", "embed_tokens.weight", ROWS, Among.ATTENTION, is_vocabulary=True),
    Rule(r"lm_head\.weight", "lm_head.weight", ROWS, Among.HEAD, is_vocabulary=True),
    Rule(r"self_attn\.q_a_proj\.weight", _FUSED_A, part=0, parts=2),
    Rule(r"self_attn\.kv_a_proj_with_mqa\.weight", _FUSED_A, part=1, parts=2),
    Rule(r"self_attn\.q_b_proj\.weight", "self_attn.q_b_proj.weight", ROWS, Among.ATTENTION),
    Rule(r"self_attn\.kv_b_proj\.weight", "self_attn.kv_b_proj.weight", ROWS, Among.ATTENTION),
    Rule(r"self_attn\.o_proj\.weight", "self_attn.o_proj.weight", COLUMNS, Among.ATTENTION),
    Rule(r"mlp\.gate_proj\.weight", "mlp.gate_up_proj.weight", ROWS, Among.DENSE, 0, 2),
    Rule(r"mlp\.up_proj\.weight", "mlp.gate_up_proj.weight", ROWS, Among.DENSE, 1, 2),
    Rule(r"mlp\.down_proj\.weight", "mlp.down_proj.weight", COLUMNS, Among.DENSE),
    Rule(rf"{_SHARED}\.gate_proj\.weight", "mlp.shared_experts.gate_up_proj.weight", ROWS, Among.SHARED_EXPERTS, 0, 2),
    Rule(rf"{_SHARED}\.up_proj\.weight", "mlp.shared_experts.gate_up_proj.weight", ROWS, Among.SHARED_EXPERTS, 1, 2),
    Rule(rf"{_SHARED}\.down_proj\.weight", "mlp.shared_experts.down_proj.weight", COLUMNS, Among.SHARED_EXPERTS),
    Rule(rf"{_EXPERT}\.gate_proj\.weight", "mlp.experts.w13_weight", ROWS, Among.EXPERTS, 0, 2),
    Rule(rf"{_EXPERT}\.up_proj\.weight", "mlp.experts.w13_weight", ROWS, Among.EXPERTS, 1, 2),
    Rule(rf"{_EXPERT}\.down_proj\.weight", "mlp.experts.w2_weight", COLUMNS, Among.EXPERTS),
)
"""All other tensors are whole on every rank, and have the name that they have in a checkpoint."""
_COMPILED = tuple((re.compile(rf"(?P<stem>(?:.*\.)?){rule.pattern}"), rule) for rule in _RULES)


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a checkpoint's tensor that the same ranks hold in the same tensor of SGLang's."""

    name: str
    """SGLang's."""
    ranks: tuple[int, ...]
    place: tuple[int, int]
    """Its place in SGLang's tensor on these ranks: the number of the expert there, and of the part."""
    pieces: int
    """The number of pieces that SGLang's tensor has there."""
    content: Tensor


def slices(name: str, tensor: Tensor, layout: EngineLayout, num_experts: int) -> Iterator[Slice]:
    """All pieces of the tensor that an engine of this layout holds; each of its ranks holds one, if any, but as many
    of an expert's as it has copies of the expert."""
    for pattern, rule in _COMPILED:
        if found := pattern.fullmatch(name):
            place = found["stem"] + rule.name
            if rule.among is Among.EXPERTS:
                return _of_expert(place, rule, tensor, layout, num_experts, int(found["expert"]))
            return _of_others(place, rule, tensor, layout)
    return _of_others(name, Rule(name, name), tensor, layout)


def _of_others(name: str, rule: Rule, tensor: Tensor, layout: EngineLayout) -> Iterator[Slice]:
    shards = _shards(tensor, rule, layout)
    for shard, content in enumerate(shards):
        ranks = tuple(range(shard, layout.tp, len(shards)))
        yield Slice(name, ranks, (0, rule.part), rule.parts, content)


def _of_expert(
    name: str, rule: Rule, tensor: Tensor, layout: EngineLayout, num_experts: int, expert: int
) -> Iterator[Slice]:
    slots = num_experts + layout.redundant_experts
    held = slots // layout.ep
    for slot in range(expert, slots, num_experts):
        for shard, content in enumerate(_shards(tensor, rule, layout)):
            rank = slot // held * layout.expert_tp + shard
            yield Slice(name, (rank,), (slot % held, rule.part), rule.parts * held, content)


def _size(among: Among, layout: EngineLayout) -> int:
    sizes = {
        Among.NONE: 1,
        Among.ATTENTION: layout.attention_tp,
        Among.DENSE: layout.dense_tp,
        Among.SHARED_EXPERTS: layout.shared_expert_tp,
        Among.HEAD: layout.head_tp,
        Among.EXPERTS: layout.expert_tp,
    }
    return sizes[among]


def _shards(tensor: Tensor, rule: Rule, layout: EngineLayout) -> Sequence[Tensor]:
    size = _size(rule.among, layout)
    if rule.is_vocabulary:
        tensor = _padded(tensor, size)
    return tensor.chunk(size, rule.axis)


def _padded(tensor: Tensor, shards: int) -> Tensor:
    multiple = VOCABULARY_MULTIPLE
    if -(-len(tensor) // multiple) * multiple % shards:
        multiple *= shards  # SGLang refuses such a number of shards on GPUs
    missing = -len(tensor) % multiple
    return pad(tensor, (0, 0, 0, missing)) if missing else tensor
