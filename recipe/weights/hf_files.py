"""Hugging Face checkpoint directories: reading pieces of tensors from memory-mapped safetensors, writing shards."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text, sync
from recipe.system.json_text import read_json
from recipe.weights.checkpoints import INDEX, SINGLE, is_hugging_face

CONFIG = "config.json"
SHARD_BYTES = 5 << 30
CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
_SHARD = ".shard"
_ITEM_BYTES = {"F32": 4, "BF16": 2}
_TYPE_NAMES = {"F32": "float32", "BF16": "bfloat16"}
NOT_CARRIED = (INDEX, "download.json", "tensors.json")
"""Files that describe one directory and would be wrong in a copy."""


class _Index(TypedDict):
    """The index of a checkpoint of several files."""

    weight_map: dict[str, str]
    """File of each tensor."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor: its file, shape, and type in safetensors' spelling (BF16, F32, ...)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceCheckpoint:
    """The tensors of a Hugging Face directory by name. Only the files' headers are read until a piece is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        if not is_hugging_face(directory):
            raise UserError(f"{directory} holds neither {INDEX} nor {SINGLE}: give a Hugging Face checkpoint directory")

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Every tensor of the files by name.

        Raises UserError for a file that is missing or truncated, and where the files and the index differ.
        """
        path = self.directory / INDEX
        if not path.exists():
            return dict(self._headers_of(SINGLE))
        indexed = read_json(path, _Index, "download it again")["weight_map"]
        found: dict[str, TensorHeader] = {}
        for file in sorted(set(indexed.values())):
            for name, header in self._headers_of(file):
                if name in found:
                    raise UserError(f"{self.directory}: tensor {name} is in {found[name].file} and again in {file}")
                found[name] = header
        for name in indexed.keys() ^ found.keys():
            where = "is not in its file" if name in indexed else f"is in {found[name].file}, but not in the index"
            raise UserError(f"{path}: tensor {name} {where}: download the checkpoint again")
        return found

    def _headers_of(self, file: str) -> Iterator[tuple[str, TensorHeader]]:
        opened = self._opened(file)
        for name in opened.keys():  # noqa: SIM118
            piece = opened.get_slice(name)
            yield name, TensorHeader(file, tuple(piece.get_shape()), piece.get_dtype())

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            path = self.directory / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{path} is named by the checkpoint's index but missing: download it again") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is truncated or no safetensors file ({error}): download it again") from None
        return self._open[file]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Size of some tensors."""
        headers = (self.headers[name] for name in names)
        return sum(math.prod(header.shape) * _ITEM_BYTES[header.dtype] for header in headers)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor `name`, or only its piece `slices`. Raises UserError if it is missing."""
        if name not in self.headers:
            raise UserError(f"{self.directory} has no tensor {name}: the checkpoint is incomplete or of another model")
        whole = self._opened(self.headers[name].file).get_slice(name)
        return whole[slices] if slices else whole[:]


def write_checkpoint(tensors: Iterable[tuple[str, Tensor]], directory: Path, companions: Path) -> None:
    """Writes `tensors` as safetensors shards with their index, and the configuration and tokenizer files of
    `companions`, beside `directory`, and renames it into place when it is whole. An older one there is replaced.
    At most one shard (SHARD_BYTES) is held in memory."""
    partial = open_beside(directory)
    for number, shard in enumerate(_shards(tensors)):
        write_shard(shard, partial, number)
    finish(partial, companions)
    move_into_place(partial, directory)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    yield shard


def beside(directory: Path) -> Path:
    """The name of `directory` while it is being written, which no reader takes for a checkpoint."""
    return directory.with_name(f".{directory.name}.partial")


def open_beside(directory: Path) -> Path:
    """An empty directory to write in, under the name `beside`."""
    partial = beside(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_shard(tensors: dict[str, Tensor], partial: Path, number: int) -> None:
    """Writes one shard to the disk, under a name that `finish` replaces."""
    path = partial / f"{number}{_SHARD}"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # else only this user could read it, and no engine in a container
    path.chmod(0o644)  # else only this user could read it, and no engine in a container
    sync(path)


def finish(partial: Path, companions: Path) -> None:
    """Names the shards as Hugging Face does, writes their index, and copies the configuration and tokenizer files of
    `companions`."""
    _carry(companions, partial)
    shards = sorted(partial.glob(f"*{_SHARD}"), key=lambda shard: int(shard.stem))
    _say_dtype(partial / CONFIG, shards[0])
    if len(shards) == 1:
        shards[0].rename(partial / SINGLE)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards):
        final = shard.with_name(f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors")
        shard.rename(final)
        with safe_open(final, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), final.name)
        total += _tensor_bytes(final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write_text(partial / INDEX, json.dumps(index, indent=1))


def _carry(companions: Path, partial: Path) -> None:
    for file in companions.iterdir():
        if file.suffix in CARRIED_SUFFIXES and file.name not in NOT_CARRIED:
            shutil.copy(file, partial / file.name)


def _say_dtype(config: Path, shard: Path) -> None:
    """Makes config.json name the type that the weights are written in, where training changed it."""
    with safe_open(shard, framework="pt") as opened:
        written = _TYPE_NAMES[opened.get_slice(next(iter(opened.keys()))).get_dtype()]
    document = read_json(config, dict[str, Any], "download it again")
    key = "dtype" if "dtype" in document else "torch_dtype"
    if document.get(key) != written:
        atomic_write_text(config, json.dumps(document | {key: written}, indent=2) + "\n")


def _tensor_bytes(path: Path) -> int:
    """A safetensors file's size without its header, whose length the first eight bytes tell."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def move_into_place(partial: Path, directory: Path) -> None:
    """Gives a finished directory its name. An older one of that name is removed."""
    if directory.exists():
        shutil.rmtree(directory)
    os.rename(partial, directory)
