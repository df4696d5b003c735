"""A Hugging Face checkpoint's headers held against the table, before any of its tensors is read."""

from collections.abc import Iterable, Iterator

import torch

from recipe.config import Architecture
from recipe.system.errors import UserError
from recipe.weights.hf_files import HuggingFaceCheckpoint, TensorHeader
from recipe.weights.table import Placement, duplicates, placements

_STORED_AS = {"bfloat16": "BF16", "float32": "F32"}
_EXACT_IN_FP32 = ("F32", "BF16")


def inspect(checkpoint: HuggingFaceCheckpoint, architecture: Architecture, *, with_mtp: bool) -> list[str]:
    """Checks that the files hold the tensors that config.json promises: all of them, no others, in the right shape and
    type. Returns notes on what a run without MTP layer leaves out.

    Raises UserError.
    """
    headers, where = checkpoint.headers, checkpoint.directory
    main = _by_hf_name(placements(architecture, with_mtp=False).values())
    mtp = _by_hf_name(placements(architecture, with_mtp=True).values()).items() - main.items()
    mtp_table = dict(mtp) if architecture.num_nextn_predict_layers else {}
    wanted = main | (mtp_table if with_mtp else {})
    _refuse(where, "lacks", sorted(wanted.keys() - headers.keys()), "the checkpoint is incomplete or of another model")
    copies = duplicates(architecture).keys() if architecture.num_nextn_predict_layers else ()
    unknown = headers.keys() - main.keys() - mtp_table.keys() - set(copies)
    _refuse(where, "has", sorted(unknown), "no part of this architecture: the checkpoint is of another model")
    for name in sorted(wanted):
        for problem in _faults(headers[name], wanted[name], architecture):
            raise UserError(f"{where}: tensor {name} {problem}: the checkpoint does not belong to its config.json")
    if left_out := [] if with_mtp else sorted(headers.keys() & mtp_table.keys()):
        return [f"{where}: the MTP layer ({len(left_out)} tensors) is left out; --mtp-num-layers 1 carries it along"]
    return []


def check_duplicates(checkpoint: HuggingFaceCheckpoint, architecture: Architecture) -> None:
    """Raises UserError if the MTP layer's copy of the embedding or of the output head differs from the original:
    trainer and engine share one tensor for both."""
    for copy, original in duplicates(architecture).items():
        if copy in checkpoint.headers and not torch.equal(checkpoint.read(copy), checkpoint.read(original)):
            raise UserError(
                f"{checkpoint.directory}: tensor {copy} differs from {original}, but trainer and engine use one tensor "
                "for both: the checkpoint cannot be trained faithfully"
            )


def _by_hf_name(table: Iterable[Placement]) -> dict[str, Placement]:
    return {name: placement for placement in table for name in placement.hf_names}


def _refuse(where: object, verb: str, names: list[str], meaning: str) -> None:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{where} {verb} tensor {names[0]}{others}: {meaning}")


def _faults(header: TensorHeader, placement: Placement, architecture: Architecture) -> Iterator[str]:
    if header.shape != placement.hf_shape:
        yield f"has shape {list(header.shape)}, but config.json asks for {list(placement.hf_shape)}"
    expected = _EXACT_IN_FP32 if placement.is_fp32 else (_STORED_AS[architecture.dtype],)
    if header.dtype not in expected:
        yield f"has type {header.dtype}, but config.json's dtype {architecture.dtype} means {' or '.join(expected)}"
