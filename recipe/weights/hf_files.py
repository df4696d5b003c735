"""Hugging Face checkpoint directories: reading pieces of tensors from memory-mapped safetensors, writing shards."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipe.errors import UserError
from recipe.files import atomic_write_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 << 30
CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")


class HuggingFaceCheckpoint:
    """The tensors of a Hugging Face directory by name. Nothing is read until a piece is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = self._read_index()
        self._open: dict[str, Any] = {}

    def _read_index(self) -> dict[str, str]:
        index = self.directory / INDEX
        if index.exists():
            return json.loads(index.read_text())["weight_map"]
        if (self.directory / SINGLE).exists():
            return dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
        raise UserError(
            f"{self.directory} holds neither {INDEX} nor {SINGLE}: give a Hugging Face checkpoint directory"
        )

    def _opened(self, file: str) -> Any:
        path = self.directory / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path} is named by the checkpoint's index but missing: download it again") from None
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}): download it again") from None

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor `name`, or only its piece `slices`. Raises UserError if it is missing."""
        if name not in self._file_of:
            raise UserError(f"{self.directory} has no tensor {name}: the checkpoint is incomplete or of another model")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._opened(file)
        whole = self._open[file].get_slice(name)
        return whole[slices] if slices else whole[:]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`."""
        return tuple(self._opened(self._file_of[name]).get_slice(name).get_shape())


def write_checkpoint(tensors: Iterable[tuple[str, Tensor]], directory: Path, companions: Path) -> None:
    """Writes `tensors` as safetensors shards with their index, and the configuration and tokenizer files of
    `companions`, beside `directory`, and renames it into place when it is whole. An older one there is replaced.
    At most one shard (SHARD_BYTES) is held in memory."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = []
    for number, shard in enumerate(_shards(tensors)):
        save_file(shard, partial / f"shard-{number}", metadata={"format": "pt"})
        shards.append(list(shard))
    _name_shards(shards, partial)
    for file in companions.iterdir():
        if file.suffix in CARRIED_SUFFIXES and file.name != INDEX:
            shutil.copy(file, partial / file.name)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.contiguous()
    yield shard


def _name_shards(shards: list[list[str]], directory: Path) -> None:
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum((directory / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write_text(directory / INDEX, json.dumps(index, indent=1))
