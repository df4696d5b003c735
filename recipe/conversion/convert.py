"""Converts a Hugging Face checkpoint into torch_dist, which training starts from (`--ref-load`).

torchrun --nproc-per-node N -m recipe.conversion.convert --hf-checkpoint DIR --save DIR [--verify] [flags]
python -m recipe.conversion.convert --hf-checkpoint DIR --save DIR [--verify] [flags]

The result is the same for every layout, and each layout reads it whole; the processes only share the work, on CPUs. The
flags are the training's: `--mtp-num-layers 1` takes the MTP layer along, architecture and parallel flags are checked as
they are for training, `--recipe NAME` brings a recipe's. `--verify` reads back what was written, compares every tensor
with its source bit for bit, and leaves its hash in tensors.json. `--check` ends before anything is read or written.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recipe.config import Architecture, Resolved, resolve
from recipe.config.usage import HELP
from recipe.conversion.destination import check_destination, writing_errors_told
from recipe.conversion.processes import Processes
from recipe.conversion.progress import ByteProgress, watched_directory
from recipe.conversion.verify import TensorRecord, verify, write_manifest
from recipe.system.errors import UserError, run_main
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.inspection import check_duplicates, inspect
from recipe.weights.table import Part, Placement, ShardCoordinates, placements
from recipe.weights.torch_dist import TorchDistCheckpoint

VERIFY, CHECK = "--verify", "--check"
_STAND_INS = (
    f"--loss-type sft --prompt-data {os.devnull} --num-rollout 1 --rollout-batch-size 16 "
    "--rollout-max-response-len 1 --lr 1 --actor-num-nodes 2 --actor-num-gpus-per-node 8"
)
"""For what a run must say and a conversion need not."""


def resolve_conversion(argv: Sequence[str]) -> Resolved:
    """A conversion's configuration: that of the recipe it names, or else of a run which neither rolls out nor learns.
    It keeps the checkpoint's own precision unless a flag says otherwise.

    Raises UserError if `--save` is missing, or for what `resolve` refuses.
    """
    given = list(argv) if "--recipe" in argv else [*_STAND_INS.split(), *argv]
    resolved = resolve(given)
    if resolved.sources["model.bf16"] != "flag":
        resolved = resolve([*given, "--fp32" if resolved.architecture.dtype == "float32" else "--bf16"])
    if resolved.sources["checkpoint.save"] != "flag":
        raise UserError("--save is missing: name the directory to write the converted checkpoint to")
    return resolved


def check(resolved: Resolved) -> None:
    """What can be told before anything is read. Raises UserError; prints notes."""
    config, architecture = resolved.config, resolved.architecture
    source = HuggingFaceCheckpoint(config.model.hf_checkpoint)
    for note in inspect(source, architecture, with_mtp=bool(config.mtp.mtp_num_layers)):
        print(f"note: {note}", file=sys.stderr)
    check_duplicates(source, architecture)
    check_destination(config.save_dir, total_bytes(resolved))


def total_bytes(resolved: Resolved) -> int:
    """Size of the converted checkpoint's tensors."""
    item = 2 if resolved.config.model.bf16 else 4
    table = placements(resolved.architecture, with_mtp=bool(resolved.config.mtp.mtp_num_layers))
    return sum(
        (4 if entry.is_fp32 else item) * len(entry.hf_names) * torch.Size(entry.hf_shape).numel()
        for entry in table.values()
    )


def pieces(
    resolved: Resolved, source: HuggingFaceCheckpoint, processes: Processes
) -> Iterator[tuple[Placement, Part, Tensor]]:
    """This rank's share, every N-th, of the Hugging Face tensors, as views of their files."""
    dtype = torch.bfloat16 if resolved.config.model.bf16 else torch.float32
    table = placements(resolved.architecture, with_mtp=bool(resolved.config.mtp.mtp_num_layers))
    every = ((entry, part) for entry in table.values() for part in entry.parts(ShardCoordinates()))
    for entry, part in itertools.islice(every, processes.rank, None, processes.world_size):
        yield entry, part, source.read(part.hf_name).to(torch.float32 if entry.is_fp32 else dtype)


def convert(resolved: Resolved, destination: Path, processes: Processes, *, verified: bool) -> dict[str, TensorRecord]:
    """Writes the torch_dist checkpoint together with the other processes. Returns the Hugging Face tensors that were
    verified by all of them."""
    from recipe.megatron import checkpoint

    source = HuggingFaceCheckpoint(resolved.config.model.hf_checkpoint)
    records: dict[str, TensorRecord] = {}
    with writing_errors_told(destination), checkpoint.written_beside(destination) as partial:
        with watched_directory("converting", partial, total_bytes(resolved), shown=processes.is_first):
            checkpoint.write_hugging_face(partial, pieces(resolved, source, processes))
        if verified:
            records = processes.gather(verify_share(resolved, partial, source, processes))
            if processes.is_first:
                write_manifest(partial, records)
    return records


def verify_share(
    resolved: Resolved, partial: Path, source: HuggingFaceCheckpoint, processes: Processes
) -> dict[str, TensorRecord]:
    """Verifies every N-th parameter."""
    table = placements(resolved.architecture, with_mtp=bool(resolved.config.mtp.mtp_num_layers))
    written = TorchDistCheckpoint(partial)
    own = list(table.values())[processes.rank :: processes.world_size]
    total = sum(map(written.bytes_of, own))
    progress = ByteProgress("verifying (this process's part)", total, shown=processes.is_first)
    records = verify(written, source, own, progress)
    progress.finish()
    return records


def count_of(architecture: Architecture, verified: int) -> str:
    """How many tensors were verified, the MTP layer's apart."""
    main = sum(len(entry.hf_names) for entry in placements(architecture, with_mtp=False).values())
    of_mtp = f" and {verified - main:,} of the MTP layer" if verified > main else ""
    return f"verified {main:,} tensors{of_mtp} bit for bit"


def main() -> None:
    arguments = sys.argv[1:]
    if not HELP.isdisjoint(arguments):
        print(__doc__)
        return
    began = time.monotonic()
    flags = [word for word in arguments if word not in (VERIFY, CHECK)]
    with Processes.joined() as processes:
        processes.first_checks(lambda: check(resolve_conversion(flags)))
        if CHECK in arguments:
            return
        resolved = resolve_conversion(flags)
        destination = resolved.config.save_dir
        records = convert(resolved, destination, processes, verified=VERIFY in arguments)
        if processes.is_first:
            print(f"wrote {destination} in {time.monotonic() - began:.1f} s")
            if records:
                print(count_of(resolved.architecture, len(records)))


if __name__ == "__main__":
    run_main(main)
