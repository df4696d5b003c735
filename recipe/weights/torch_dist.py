"""A torch_dist checkpoint's parameters as Hugging Face tensors, without megatron or a process group, whatever layout
wrote it.

Its keys are the table's names, and the whole of a parameter is what one unsharded rank would hold. The files are mapped
into memory: a tensor that one rank wrote in one piece is a view of its file, and nothing is copied.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _create_file_view, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from recipe.system.errors import UserError
from recipe.weights.checkpoints import METADATA
from recipe.weights.table import Placement, ShardCoordinates

_WHOLE = ShardCoordinates()


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and how far it goes along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box's part of `outer` lies in `outer`; an empty slice where they do not meet."""
        axes = zip(self.offsets, self.sizes, outer.offsets, outer.sizes, strict=True)
        bounds = ((max(0, at - origin), min(size, at - origin + length)) for at, length, origin, size in axes)
        return tuple(slice(start, max(start, stop)) for start, stop in bounds)


def region(placement: Placement, index: tuple[int, ...], dimensions: int) -> Box:
    """The block of a whole parameter that is the Hugging Face tensor at `index` of the grid. megatron keeps the grid's
    axes for experts, and joins gate and up projection into the first axis elsewhere."""
    shape = placement.hf_shape
    if dimensions == len(placement.grid) + len(shape):
        return Box((*index, *(0 for _ in shape)), (*(1 for _ in index), *shape))
    return Box((index[0] * shape[0], *(0 for _ in shape[1:])), shape)


class TorchDistCheckpoint:
    """The model parameters of a torch_dist directory. Only its metadata is read until a parameter is asked for."""

    def __init__(self, directory: Path) -> None:
        if not (directory / METADATA).is_file():
            raise UserError(f"{directory} is no torch_dist checkpoint: it holds no {METADATA}")
        self.directory = directory
        metadata = FileSystemReader(directory).read_metadata()
        self._stored_at: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._maps: dict[str, mmap.mmap] = {}

    def holds(self, placement: Placement) -> bool:
        """Whether the parameter is there."""
        return placement.name in self._entries

    def bytes_of(self, placement: Placement) -> int:
        """Size of a whole parameter. Raises UserError if it is missing."""
        entry = self._entry(placement)
        return entry.size.numel() * entry.properties.dtype.itemsize

    def tensors(self, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that make up a parameter. Raises UserError if it is missing or a file broken."""
        entry = self._entry(placement)
        chunks = [
            (
                Box(tuple(chunk.offsets), tuple(chunk.sizes)),
                self._stored_at[MetadataIndex(placement.name, chunk.offsets)],
            )
            for chunk in entry.chunks
        ]
        for part in placement.parts(_WHOLE):
            wanted = region(placement, part.index, len(entry.size))
            yield part.hf_name, self._block(wanted, chunks, entry.properties.dtype).view(placement.hf_shape)

    def _entry(self, placement: Placement) -> TensorStorageMetadata:
        if not self.holds(placement):
            raise UserError(f"{self.directory} lacks {placement.name}: it was written for another model")
        return self._entries[placement.name]

    def _block(self, wanted: Box, chunks: Sequence[tuple[Box, _StorageInfo]], dtype: torch.dtype) -> Tensor:
        assembled: Tensor | None = None
        filled = 0
        for held, stored_at in chunks:
            source, target = wanted.slices_in(held), held.slices_in(wanted)
            sizes = tuple(piece.stop - piece.start for piece in target)
            if 0 in sizes:
                continue
            piece = self._mapped(stored_at)[source]
            if sizes == wanted.sizes:
                return piece.contiguous()
            assembled = torch.empty(wanted.sizes, dtype=dtype) if assembled is None else assembled
            assembled[target] = piece
            filled += piece.numel()
        if assembled is None or filled < assembled.numel():
            raise UserError(
                f"{self.directory} lacks a part of a parameter: it is damaged; restore it, or convert again"
            )
        return assembled

    def _mapped(self, stored_at: _StorageInfo) -> Tensor:
        """A tensor that was saved as one piece, as a view of its file."""
        path = self.directory / stored_at.relative_path
        try:
            with path.open("rb") as file:
                if path.name not in self._maps:
                    self._maps[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                view: Any = _create_file_view(file, stored_at.offset, stored_at.length)
                reader: Any = torch._C.PyTorchFileReader(view)
                offset = stored_at.offset + reader.get_record_offset("data/0")
                view.seek(0)
                header = torch.load(view, map_location="meta", weights_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} is missing, cut off or damaged ({error}): restore it, or convert again") from error
        flat = torch.frombuffer(self._maps[path.name], dtype=header.dtype, count=header.numel(), offset=offset)
        return flat.as_strided(header.shape, header.stride())
