"""Converts a Hugging Face checkpoint into torch_dist, which training starts from under any layout (`--ref-load`).

python -m recipe.weights.convert --hf-checkpoint DIR --save DIR [architecture and parallel flags]
torchrun --nproc-per-node N -m recipe.weights.convert ...
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recipe.config import Resolved, resolve
from recipe.errors import UserError, run_main
from recipe.weights.hf_files import HuggingFaceCheckpoint


def resolve_conversion(argv: Sequence[str], world_size: int) -> Resolved:
    """A conversion's configuration: that of a run which neither rolls out nor learns, in the checkpoint's own precision
    unless a flag says otherwise.

    Raises UserError if `--save` is missing, or for what `resolve` refuses.
    """
    stand_ins = f"--loss-type sft --prompt-data {os.devnull} --num-rollout 1 --rollout-batch-size {world_size} "
    stand_ins += f"--rollout-max-response-len 1 --lr 1 --actor-num-gpus-per-node {world_size}"
    resolved = resolve([*stand_ins.split(), *argv])
    if resolved.sources["model.bf16"] == "default" and resolved.architecture.dtype == "float32":
        resolved = resolve([*stand_ins.split(), "--fp32", *argv])
    if resolved.config.checkpoint.save is None:
        raise UserError("--save is missing: name the directory to write the converted checkpoint to")
    return resolved


def convert(resolved: Resolved, destination: Path, rank: int, world_size: int) -> None:
    """Reads this rank's pieces and writes the torch_dist checkpoint together with the other ranks."""
    from recipe.megatron import checkpoint, layout
    from recipe.megatron.model import build_chunks
    from recipe.megatron.weights import load_hugging_face

    config, architecture = resolved.config, resolved.architecture
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    layout.join(layout.Rendezvous(rank, local_rank, world_size, address, port), config, architecture)
    chunks = build_chunks(config, architecture)
    load_hugging_face(chunks, architecture, HuggingFaceCheckpoint(config.model.hf_checkpoint))
    checkpoint.save_weights(destination, chunks)
    layout.leave()


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    resolved = resolve_conversion(sys.argv[1:], world_size)
    destination = resolved.config.save_dir
    if destination.exists():
        raise UserError(f"{destination} exists already: remove it, or give another --save")
    began = time.monotonic()
    convert(resolved, destination, rank, world_size)
    if rank == 0:
        print(f"wrote {destination} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    run_main(main)
