"""Writes a torch_dist checkpoint, of whichever layout, as a Hugging Face directory for transformers and SGLang.

python -m recipe.conversion.export --load DIR --hf-checkpoint ORIGIN --save DIR [--verify]
torchrun --nproc-per-node N -m recipe.conversion.export ...      each process writes every N-th shard

`--load` is a torch_dist directory or a folder of training checkpoints, whose newest is taken. Configuration and
tokenizer come from ORIGIN, and so does the MTP layer if the checkpoint was trained without it.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from recipe.config import Architecture
from recipe.conversion.destination import check_destination, writing_errors_told
from recipe.conversion.processes import Processes
from recipe.conversion.progress import ByteProgress
from recipe.conversion.verify import TensorRecord, verify, write_manifest
from recipe.system.errors import run_main
from recipe.weights.checkpoints import latest
from recipe.weights.hf_files import (
    SHARD_BYTES,
    HuggingFaceCheckpoint,
    beside,
    finish,
    move_into_place,
    open_beside,
    write_shard,
)
from recipe.weights.origin import mtp_table, with_duplicates
from recipe.weights.table import Placement, placements
from recipe.weights.torch_dist import TorchDistCheckpoint


@dataclass(frozen=True)
class Export:
    """What is written, from where, in which shards."""

    source: TorchDistCheckpoint
    origin: HuggingFaceCheckpoint
    architecture: Architecture
    shards: Sequence[Sequence[Placement]]
    of_origin: frozenset[str]
    """Parameters, of an MTP layer that was not trained, that come from the origin."""

    @classmethod
    def plan(cls, source: TorchDistCheckpoint, origin: HuggingFaceCheckpoint, architecture: Architecture) -> Self:
        """Shards of at most SHARD_BYTES, in the table's order."""
        mtp = mtp_table(architecture)
        is_trained = any(source.holds(entry) for entry in mtp)
        is_untrained = not is_trained and any(entry.hf_names[0] in origin.headers for entry in mtp)
        of_origin = frozenset(entry.name for entry in mtp) if is_untrained else frozenset()
        table = placements(architecture, with_mtp=is_trained or is_untrained).values()
        shards: list[list[Placement]] = [[]]
        size = 0
        export = cls(source, origin, architecture, shards, of_origin)
        for entry in table:
            added = export.bytes_of([entry])
            if shards[-1] and size + added > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += added
        return export

    def bytes_of(self, entries: Iterable[Placement]) -> int:
        """Size of some parameters, wherever they come from."""
        return sum(
            self.origin.bytes_of(entry.hf_names) if entry.name in self.of_origin else self.source.bytes_of(entry)
            for entry in entries
        )

    @property
    def trained(self) -> list[Placement]:
        """The parameters that come from the checkpoint."""
        return [entry for shard in self.shards for entry in shard if entry.name not in self.of_origin]

    @property
    def total_bytes(self) -> int:
        """Size of all parameters."""
        return sum(map(self.bytes_of, self.shards))

    def tensors(self, shard: Sequence[Placement]) -> dict[str, Tensor]:
        """The Hugging Face tensors of a shard."""
        found: list[tuple[str, Tensor]] = []
        for entry in shard:
            if entry.name in self.of_origin:
                found += [(name, self.origin.read(name)) for name in entry.hf_names]
            else:
                found += self.source.tensors(entry)
        return dict(with_duplicates(found, self.origin, self.architecture))


def write(export: Export, partial: Path, processes: Processes) -> None:
    """Writes this process's shards."""
    own = list(enumerate(export.shards))[processes.rank :: processes.world_size]
    total = sum(export.bytes_of(shard) for _, shard in own)
    progress = ByteProgress("writing (this process's part)", total, shown=processes.is_first)
    for number, shard in own:
        write_shard(export.tensors(shard), partial, number)
        progress.advance(export.bytes_of(shard))
    progress.finish()


def verified(export: Export, partial: Path, processes: Processes) -> dict[str, TensorRecord]:
    """Reads back what all processes wrote, each a part of it. Returns the records of all tensors of the checkpoint."""
    own = export.trained[processes.rank :: processes.world_size]
    total = export.bytes_of(own)
    progress = ByteProgress("verifying (this process's part)", total, shown=processes.is_first)
    records = verify(export.source, HuggingFaceCheckpoint(partial), own, progress)
    progress.finish()
    return processes.gather(records)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipe.conversion.export", description=__doc__)
    parser.add_argument("--load", type=Path, required=True, help="torch_dist directory, or training checkpoints")
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="the checkpoint that training started from")
    parser.add_argument("--save", type=Path, required=True, help="directory to write")
    parser.add_argument("--verify", action="store_true", help="read back and compare every tensor, write tensors.json")
    return parser.parse_args(argv)


def open_export(arguments: argparse.Namespace) -> Export:
    """The export that the command line asks for. Raises UserError if one of the checkpoints cannot be read."""
    source = TorchDistCheckpoint(latest(arguments.load) or arguments.load)
    origin = HuggingFaceCheckpoint(arguments.hf_checkpoint)
    return Export.plan(source, origin, Architecture.from_checkpoint(arguments.hf_checkpoint))


def export_checkpoint(arguments: argparse.Namespace, processes: Processes) -> dict[str, TensorRecord]:
    """Writes the Hugging Face directory together with the other processes. Returns the tensors that were verified."""
    processes.first_checks(lambda: check_destination(arguments.save, open_export(arguments).total_bytes))
    plan = open_export(arguments)
    partial = beside(arguments.save)
    if processes.is_first:
        open_beside(arguments.save)
        if plan.of_origin:
            told = f"{plan.source.directory} has no MTP layer; that of {plan.origin.directory} is taken"
            print(f"note: {told}", file=sys.stderr)
    processes.wait()
    with writing_errors_told(arguments.save):
        write(plan, partial, processes)
    processes.wait()
    if processes.is_first:
        finish(partial, plan.origin.directory)
    processes.wait()
    records = verified(plan, partial, processes) if arguments.verify else {}
    if processes.is_first:
        if records:
            write_manifest(partial, records)
        move_into_place(partial, arguments.save)
    return records


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    with Processes.joined() as processes:
        records = export_checkpoint(arguments, processes)
        if processes.is_first:
            print(f"wrote {arguments.save} in {time.monotonic() - began:.1f} s")
            if records:
                print(f"verified {len(records):,} tensors bit for bit")


if __name__ == "__main__":
    run_main(main)
