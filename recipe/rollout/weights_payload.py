"""Weights on their way to an engine on the same machine: SGLang's serialization, tensors by shared-memory handle.

A payload is the base64 text of a pickle of (name, tensor) pairs in which a tensor is the name of a shared-memory
segment. Nothing but the handle crosses; the segment goes when both sides have let go of it, and torch's watcher process
removes it should they be killed first. A payload can be read once: each engine gets its own.
"""

import base64
import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import torch
import torch.multiprocessing
from torch import Tensor

NamedTensor = tuple[str, Tensor]

ALIGNMENT = 64
"""Bytes; a tensor in a staging buffer begins at a multiple of it."""


class PayloadError(ValueError):
    """A payload that is not one, or that asks for more than tensors."""


def stage(weights: Sequence[NamedTensor]) -> list[NamedTensor]:
    """Copies the tensors into one buffer that another process can open (shared memory, or the GPU's own); the result
    are views of it, under the same names. All tensors are on one device."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in weights]
    with _shared_by_name():
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=weights[0][1].device).share_memory_()
    staged: list[NamedTensor] = []
    for (name, tensor), room in zip(weights, buffer.split(sizes), strict=True):
        view = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        staged.append((name, view))
    return staged


def serialize_named_tensors(weights: Sequence[NamedTensor]) -> str:
    """A payload for one engine. Tensors outside shared memory are moved there one by one: `stage` them first."""
    buffer = io.BytesIO()
    with _shared_by_name():
        ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(list(weights))
    return base64.b64encode(buffer.getvalue()).decode()


def deserialize_named_tensors(payload: str, load_format: str | None = None) -> list[NamedTensor]:
    """The tensors of a payload; load_format "flattened_bucket" is SGLang's one tensor with a table of its parts.

    Raises PayloadError for anything but tensors: a pickle that names any function besides those that rebuild them
    is refused before the function is called.
    """
    try:
        content = _TensorUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load()
        return (
            _from_bucket(content)
            if load_format == "flattened_bucket"
            else [(str(name), _tensor(t)) for name, t in content]
        )
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, RuntimeError) as error:
        raise PayloadError(f"the serialized tensors cannot be read: {error}") from error


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Within it torch shares memory by a name that any process can open, not by a descriptor of this one."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


@dataclass
class _BucketPart:
    """SGLang's FlattenedTensorMetadata: bytes [start_idx, end_idx) of the bucket."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def _from_bucket(content: dict[str, Any]) -> list[NamedTensor]:
    flat = _tensor(content["flattened_tensor"]).view(torch.uint8)
    parts = cast(list[_BucketPart], content["metadata"])
    return [(part.name, flat[part.start_idx : part.end_idx].view(part.dtype).view(part.shape)) for part in parts]


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise PayloadError(f"a {type(value).__name__} where a tensor should be")
    return value


_REDUCTIONS = "torch.multiprocessing.reductions"
_ALLOWED = {
    (_REDUCTIONS, "rebuild_tensor"),
    (_REDUCTIONS, "rebuild_typed_storage"),
    (_REDUCTIONS, "rebuild_storage_filename"),
    (_REDUCTIONS, "rebuild_storage_empty"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch.storage", "UntypedStorage"),
    ("torch.nn.parameter", "Parameter"),
} | {("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8")}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"):
            return _BucketPart
        if (module, name) not in _ALLOWED:
            raise PayloadError(f"{module}.{name} is no part of a tensor")
        return super().find_class(module, name)
