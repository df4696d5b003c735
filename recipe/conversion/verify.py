"""A torch_dist checkpoint and a Hugging Face one compared tensor by tensor, bit for bit."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipe.conversion.progress import ByteProgress
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.table import Placement
from recipe.weights.torch_dist import TorchDistCheckpoint

MANIFEST = "tensors.json"


@dataclass(frozen=True)
class TensorRecord:
    """What a tensor was when it was verified; `sha256` is of its little-endian bytes, row by row."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def verify(
    converted: TorchDistCheckpoint,
    original: HuggingFaceCheckpoint,
    table: Sequence[Placement],
    progress: ByteProgress,
) -> dict[str, TensorRecord]:
    """Reads the parameters of `table` on both sides. Returns a record for every Hugging Face tensor.

    Raises UserError at the first tensor that differs in a bit.
    """
    records: dict[str, TensorRecord] = {}
    for placement in table:
        for name, held in converted.tensors(placement):
            if not _same_bits(held, original.read(name)):
                raise UserError(f"tensor {name} differs between {converted.directory} and {original.directory}")
            records[name] = _record(held)
        progress.advance(converted.bytes_of(placement))
    return records


def _same_bits(held: Tensor, stored: Tensor) -> bool:
    """A type that was widened to hold the tensor (a bf16 router bias in fp32) is compared after widening."""
    widened = stored.to(held.dtype)
    is_exact = widened.dtype == stored.dtype or torch.equal(_bits(widened.to(stored.dtype)), _bits(stored))
    return held.shape == stored.shape and is_exact and torch.equal(_bits(held), _bits(widened))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _record(tensor: Tensor) -> TensorRecord:
    content: Any = _bits(tensor).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRecord(dtype, tuple(tensor.shape), hashlib.sha256(content).hexdigest())


def write_manifest(directory: Path, records: dict[str, TensorRecord]) -> None:
    """Writes the records of all tensors as `directory`/tensors.json."""
    document = {name: asdict(records[name]) for name in sorted(records)}
    atomic_write_text(directory / MANIFEST, json.dumps(document, indent=0) + "\n")
