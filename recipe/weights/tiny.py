"""A glm4_moe_lite checkpoint small enough for a laptop, random but complete: MLA, a dense layer, sigmoid router with
fp32 bias, shared expert, MTP layer, tokenizer and chat template.

    python -m recipe.weights.tiny --output DIR [--seed N] [--kernel-sizes]
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from recipe.config import Architecture
from recipe.data.tiny_tokenizer import EOS_TOKENS, VOCAB_SIZE, build_tiny_tokenizer
from recipe.system.errors import run_main
from recipe.system.files import atomic_write_text
from recipe.system.seeds import derive
from recipe.weights.hf_files import write_checkpoint
from recipe.weights.table import Placement, placements

INITIAL_DEVIATION = 0.02
CONTEXT_LENGTH = 64
KERNEL_SIZES: Mapping[str, object] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 16,
    "max_position_embeddings": 2048,
}
"""Changes to `tiny_config` for GPUs: the latent and head sizes of GLM-4.7-Flash, which MLA's kernels are made for, and
experts of whole tiles. 12 million parameters."""


def tiny_config(vocab_size: int, eos_token_ids: list[int], pad_token_id: int) -> dict[str, object]:
    """config.json of the tiny model."""
    return {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": eos_token_ids,
        "pad_token_id": pad_token_id,
    }


def _initial(placement: Placement, generator: torch.Generator) -> torch.Tensor:
    if len(placement.hf_shape) == 1:
        return torch.zeros(placement.hf_shape) if placement.is_fp32 else torch.ones(placement.hf_shape)
    return torch.randn(placement.hf_shape, generator=generator) * INITIAL_DEVIATION


def write_tiny_checkpoint(directory: Path, seed: int, changes: Mapping[str, object] | None = None) -> None:
    """Writes the checkpoint, its config.json with `changes`; the same seed gives the same bytes."""
    tokenizer = build_tiny_tokenizer()
    companions = directory.with_name(f".{directory.name}.companions")
    companions.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(companions)
    eos = tokenizer.convert_tokens_to_ids(list(EOS_TOKENS))
    config = tiny_config(VOCAB_SIZE, eos, tokenizer.pad_token_id) | dict(changes or {})
    atomic_write_text(companions / "config.json", json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(derive(seed, "tiny-checkpoint"))
    table = placements(Architecture.from_checkpoint(companions), with_mtp=True)
    tensors = ((name, _initial(entry, generator)) for entry in table.values() for name in entry.hf_names)
    write_checkpoint(tensors, directory, companions)
    for file in companions.iterdir():
        file.unlink()
    companions.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.weights.tiny", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--kernel-sizes", action="store_true", help="MLA's sizes as in GLM-4.7-Flash, for GPUs")
    arguments = parser.parse_args()
    write_tiny_checkpoint(arguments.output, arguments.seed, KERNEL_SIZES if arguments.kernel_sizes else None)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_main(main)
