"""The model's architecture, read from the checkpoint's own config.json: no default is ever taken for a fact."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from recipe.config.error_text import plainly, refuse
from recipe.config.fields import expand_layer_pattern
from recipe.config.flags import spell
from recipe.config.groups_training import ModelConfig
from recipe.system.errors import UserError, shortened
from recipe.system.json_text import read_json

MODEL_TYPE = "glm4_moe_lite"

_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "rope_interleave": (True,),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0,),
    "norm_topk_prob": (True,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
}
"""What the trainer implements, for keys of config.json that could say otherwise."""


class Architecture(BaseModel):
    """The architecture in Hugging Face's names (config.json's)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_type: Literal["glm4_moe_lite"]
    """The only family this recipe trains."""
    vocab_size: PositiveInt
    """Rows of the embedding and of the output head."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width of a dense layer's MLP."""
    moe_intermediate_size: PositiveInt
    """Width of one expert."""
    num_hidden_layers: PositiveInt
    """Layers, without the MTP layer."""
    num_attention_heads: PositiveInt
    """Attention heads."""
    n_routed_experts: PositiveInt
    """Routed experts of a layer."""
    n_shared_experts: PositiveInt
    """Shared experts, held as one MLP of n_shared_experts x moe_intermediate_size."""
    num_experts_per_tok: PositiveInt
    """Experts a token is sent to."""
    first_k_dense_replace: NonNegativeInt
    """Leading layers with a dense MLP."""
    routed_scaling_factor: PositiveFloat
    """Factor on the normalised weights of the chosen experts."""
    norm_topk_prob: bool
    """The chosen experts' weights are normalised to sum 1."""
    n_group: PositiveInt
    """Groups of experts the router chooses among first."""
    topk_group: PositiveInt
    """Groups a token may be sent to."""
    q_lora_rank: PositiveInt
    """Rank of the query projection."""
    kv_lora_rank: PositiveInt
    """Rank of the key and value projection."""
    qk_nope_head_dim: PositiveInt
    """Width of a head's queries and keys without the rotary part."""
    qk_rope_head_dim: PositiveInt
    """Width of the rotary part."""
    v_head_dim: PositiveInt
    """Width of a head's values."""
    rms_norm_eps: PositiveFloat
    """Epsilon of RMSNorm."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding."""
    rope_interleave: bool
    """Rotary pairs are neighbours (2i, 2i+1)."""
    max_position_embeddings: PositiveInt
    """The longest context in tokens."""
    num_nextn_predict_layers: NonNegativeInt
    """MTP layers, stored as layers num_hidden_layers and on."""
    eos_token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Tokens that end a response."""
    pad_token_id: NonNegativeInt | None
    """Padding token."""
    dtype: Literal["bfloat16", "float32"]
    """Type of the stored weights."""
    tie_word_embeddings: bool
    """The output head is the embedding."""
    attention_bias: bool
    """Biases in the attention projections."""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Self:
        """Reads `folder`/config.json. Raises UserError naming every field that is missing or not implemented."""
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no config.json: --hf-checkpoint must be the folder of a Hugging Face checkpoint; "
                f"`hf download zai-org/GLM-4.7-Flash --local-dir {folder}` gets the real one, "
                "`make train-tiny` makes the tiny one"
            )
        document = read_json(path, dict[str, Any], "download it again")
        if (found := document.get("model_type")) != MODEL_TYPE:
            raise UserError(f"{path}: model_type is {shortened(found)}, but this recipe trains {MODEL_TYPE} only")
        refuse([f"{path}: {problem}" for problem in _not_implemented(document)])
        try:
            return cls.model_validate(_own_names(document))
        except ValidationError as error:
            refuse([_explain(path, str(item["loc"][0]), item["type"], item["msg"]) for item in error.errors()])
            raise

    @property
    def moe_layer_freq(self) -> tuple[int, ...]:
        """0 for a dense layer, 1 for one with experts, in megatron's form."""
        dense = self.first_k_dense_replace
        return (0,) * dense + (1,) * (self.num_hidden_layers - dense)

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Width of the shared experts together."""
        return self.n_shared_experts * self.moe_intermediate_size


def _explain(path: Path, name: str, kind: str, message: str) -> str:
    alias = {"eos_token_ids": "eos_token_id"}.get(name, name)
    return f"{path} has no {alias}" if kind == "missing" else f"{path}: {alias}: {plainly(message)}"


def _not_implemented(document: dict[str, Any]) -> Iterator[str]:
    for key, allowed in _IMPLEMENTED.items():
        if key in document and document[key] not in allowed:
            yield f"{key} is {document[key]!r}, and only {allowed[0]!r} is implemented"
    rope = document.get("rope_parameters") or {}
    layer_types = document.get("mlp_layer_types") or []
    if not isinstance(rope, dict) or not isinstance(layer_types, list):
        yield "rope_parameters is no object, or mlp_layer_types no list"
        return
    kind = rope.get("rope_type", "default")
    if kind != "default":
        yield f"rope_parameters.rope_type is {kind!r}, and only 'default' is implemented"
    if "dense" in layer_types[layer_types.count("dense") :]:
        yield "mlp_layer_types has dense layers after expert layers, and only leading ones are implemented"
    if document.get("num_key_value_heads", document.get("num_attention_heads")) != document.get("num_attention_heads"):
        yield "num_key_value_heads differs from num_attention_heads, which latent attention does not have"


def _own_names(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of Architecture that `document` states, under our names.

    config.json spells some facts in two ways (transformers 4 and 5): rope_theta alone or in rope_parameters,
    torch_dtype or dtype, first_k_dense_replace or mlp_layer_types. Two facts it may leave out are the family's: rotary
    pairs are interleaved, and there is no padding token.
    """
    facts = {name: document[name] for name in Architecture.model_fields if name in document}
    facts.setdefault("rope_interleave", True)
    facts.setdefault("pad_token_id", None)
    rope = document.get("rope_parameters") or {}
    if "rope_theta" in rope:
        facts["rope_theta"] = rope["rope_theta"]
    if "torch_dtype" in document:
        facts.setdefault("dtype", document["torch_dtype"])
    if document.get("mlp_layer_types"):
        facts.setdefault("first_k_dense_replace", document["mlp_layer_types"].count("dense"))
    if "eos_token_id" in document:
        ids = document["eos_token_id"]
        facts["eos_token_ids"] = ids if isinstance(ids, list) else [ids]
    return facts


_STATED: MappingProxyType[str, tuple[str, Callable[[Architecture], object]]] = MappingProxyType(
    {
        "num_layers": ("num_hidden_layers", lambda a: a.num_hidden_layers),
        "hidden_size": ("hidden_size", lambda a: a.hidden_size),
        "ffn_hidden_size": ("intermediate_size", lambda a: a.intermediate_size),
        "num_attention_heads": ("num_attention_heads", lambda a: a.num_attention_heads),
        "kv_channels": ("qk_nope_head_dim", lambda a: a.qk_nope_head_dim),
        "q_lora_rank": ("q_lora_rank", lambda a: a.q_lora_rank),
        "kv_lora_rank": ("kv_lora_rank", lambda a: a.kv_lora_rank),
        "qk_head_dim": ("qk_nope_head_dim", lambda a: a.qk_nope_head_dim),
        "qk_pos_emb_head_dim": ("qk_rope_head_dim", lambda a: a.qk_rope_head_dim),
        "v_head_dim": ("v_head_dim", lambda a: a.v_head_dim),
        "vocab_size": ("vocab_size", lambda a: a.vocab_size),
        "max_position_embeddings": ("max_position_embeddings", lambda a: a.max_position_embeddings),
        "rotary_base": ("rope_theta", lambda a: a.rope_theta),
        "norm_epsilon": ("rms_norm_eps", lambda a: a.rms_norm_eps),
        "add_qkv_bias": ("attention_bias", lambda a: a.attention_bias),
        "untie_embeddings_and_output_weights": ("not tie_word_embeddings", lambda a: not a.tie_word_embeddings),
        "num_experts": ("n_routed_experts", lambda a: a.n_routed_experts),
        "moe_ffn_hidden_size": ("moe_intermediate_size", lambda a: a.moe_intermediate_size),
        "moe_shared_expert_intermediate_size": (
            "n_shared_experts x moe_intermediate_size",
            lambda a: a.shared_expert_intermediate_size,
        ),
        "moe_router_topk": ("num_experts_per_tok", lambda a: a.num_experts_per_tok),
        "moe_router_num_groups": ("n_group", lambda a: a.n_group),
        "moe_router_group_topk": ("topk_group", lambda a: a.topk_group),
        "moe_router_topk_scaling_factor": ("routed_scaling_factor", lambda a: a.routed_scaling_factor),
    }
)
"""What config.json states: megatron's name -> (config.json's name, value)."""

_FIXED: MappingProxyType[str, object] = MappingProxyType(
    {
        "rotary_percent": 1.0,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rope_type": "rope",
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "swiglu": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "apply_rope_fusion": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
    }
)
"""What the family (or this trainer) has fixed: megatron's name -> value."""


def contradictions(model: ModelConfig, architecture: Architecture) -> Iterator[str]:
    """A sentence for every architecture flag that differs from the checkpoint, naming both values."""
    given = {name: value for name, value in model if value is not None}
    config = model.hf_checkpoint / "config.json"
    for name, (stated_as, value_of) in _STATED.items():
        stated = value_of(architecture)
        if name in given and given[name] != stated:
            flag = spell(f"model.{name}", given[name])
            yield f"{flag} contradicts {config}, where {stated_as} is {_plain(stated)}"
    for name, fixed in _FIXED.items():
        if name in given and given[name] != fixed:
            flag = spell(f"model.{name}", given[name])
            yield f"{flag} contradicts the {MODEL_TYPE} trained here: {name} is {_plain(fixed)}"
    yield from _layer_pattern_contradiction(model, architecture)
    divisor = model.make_vocab_size_divisible_by
    if divisor is not None and architecture.vocab_size % divisor:
        yield (
            f"--make-vocab-size-divisible-by {divisor} would pad the vocabulary of {architecture.vocab_size}, "
            "which is never padded here; leave the flag out"
        )


def _layer_pattern_contradiction(model: ModelConfig, architecture: Architecture) -> Iterator[str]:
    if model.moe_layer_freq is None:
        return
    given = expand_layer_pattern(model.moe_layer_freq, architecture.num_hidden_layers)
    if given != architecture.moe_layer_freq:
        dense = architecture.first_k_dense_replace
        yield (
            f"--moe-layer-freq with {len(given) - sum(given)} dense and {sum(given)} expert layers contradicts "
            f"{model.hf_checkpoint / 'config.json'}, which says "
            f"[0]*{dense}+[1]*{architecture.num_hidden_layers - dense} (first_k_dense_replace {dense})"
        )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
