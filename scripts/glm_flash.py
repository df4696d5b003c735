"""What the benchmarks share: the architecture of GLM-4.7-Flash with fewer layers."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipe.config import Architecture
from recipe.data.tiny_tokenizer import CHAT_TEMPLATE
from recipe.weights.hf_files import write_checkpoint
from recipe.weights.table import Placement, placements

CONFIG: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "rope_interleave": True,
    "max_position_embeddings": 202752,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.0.0",
}

SPECIAL_TOKENS = {
    154820: "<|endoftext|>",
    154822: "[gMASK]",
    154824: "<sop>",
    154826: "<|system|>",
    154827: "<|user|>",
    154828: "<|assistant|>",
    154829: "<|observation|>",
    154841: "<think>",
    154842: "</think>",
}
"""Of GLM-4.7, that a chat has."""

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "eos_token_id": [1],
    "pad_token_id": 0,
}
"""Changes to CONFIG that make it fit for a CPU."""


def write_config(directory: Path, moe_layers: int, **changes: object) -> None:
    """Writes config.json of one dense and `moe_layers` MoE layers."""
    directory.mkdir(parents=True, exist_ok=True)
    document = CONFIG | {"num_hidden_layers": moe_layers + 1} | changes
    (directory / "config.json").write_text(json.dumps(document))


def write_synthetic(
    directory: Path, moe_layers: int, deviation: float = 1.0, spread: float = 0.0, **changes: object
) -> int:
    """Writes a random bf16 checkpoint with its MTP layer: matrices of this deviation; norms around 1 and the routers'
    biases around 0, with this spread. What lies in the folder beside it whose name ends in -companions, a tokenizer
    say, goes along. Returns its size in bytes."""
    companions = directory.with_name(f"{directory.name}-companions")
    write_config(companions, moe_layers, **changes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensor(entry: Placement) -> torch.Tensor:
        is_vector = len(entry.hf_shape) == 1
        values = torch.randn(entry.hf_shape, generator=generator, device=device) * (spread if is_vector else deviation)
        if entry.is_fp32:
            return values.cpu()
        return (values + 1 if is_vector else values).to("cpu", torch.bfloat16)

    table = placements(Architecture.from_checkpoint(companions), with_mtp=True)
    write_checkpoint(((name, tensor(e)) for e in table.values() for name in e.hf_names), directory, companions)
    return sum(file.stat().st_size for file in directory.iterdir())


def write_slice(directory: Path, moe_layers: int, tiny: bool = False) -> None:
    """Writes a checkpoint that the whole loop can run: random weights as small as at a training's beginning, and a
    tokenizer whose words are its tokens, with the published special tokens and chat template. `tiny`: for a CPU."""
    changes: dict[str, Any] = TINY | {"vocab_size": 128, "eos_token_id": [127], "pad_token_id": 126} if tiny else {}
    config = CONFIG | changes
    special = {126: "<|endoftext|>", 127: "<|user|>", 125: "<|assistant|>"} if tiny else SPECIAL_TOKENS
    vocabulary = {special.get(number, f" w{number}"): number for number in range(config["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    words.decoder = decoders.Fuse()
    words.add_tokens([AddedToken(token, special="think" not in token, normalized=False) for token in special.values()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(directory.with_name(f"{directory.name}-companions"))
    write_synthetic(directory, moe_layers, deviation=0.02, **changes)


def environment() -> str:
    """GPU and versions, for the record."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
