"""Weights on their way to an engine on the same machine: SGLang's serialization, tensors by shared-memory handle.

A payload is the base64 text of a pickle in which a tensor is the name of a shared-memory segment, or CUDA's handle of
a piece of the GPU's memory. Nothing but the handle crosses; a segment goes when both sides have let go of it, and
torch's watcher process removes it should they be killed first. A payload can be read once: each process of an engine
gets its own. It names a GPU by its UUID, for processes number the GPUs that they see, each by itself.
"""

import base64
import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from recipe.system.cuda_allocator import EXPANDABLE, segments_are_expandable

NamedTensor = tuple[str, Tensor]

ALIGNMENT = 64
"""Bytes; a tensor in a staging buffer begins at a multiple of it."""


class PayloadError(ValueError):
    """A payload that is not one, or that asks for more than tensors."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors in one buffer that another process can open: shared memory, or the GPU's own."""

    buffer: Tensor
    """Bytes."""
    weights: list[NamedTensor]
    """Views of it."""

    @classmethod
    def of(cls, weights: Sequence[NamedTensor]) -> Self:
        """Copies the tensors, which are all on one device."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in weights]
        with _shared_by_name(), _in_whole_segments():
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=weights[0][1].device).share_memory_()
        views: list[NamedTensor] = []
        for (name, tensor), room in zip(weights, buffer.split(sizes), strict=True):
            view = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            views.append((name, view))
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)  # who opens the buffer knows nothing of this process's stream
        return cls(buffer, views)

    def payload(self) -> str:
        """What one engine process is sent: SGLang's "flattened_bucket", the buffer and a table of its parts. SGLang
        reads the table by the names of its attributes alone."""
        parts = [
            SimpleNamespace(
                name=name,
                shape=view.shape,
                dtype=view.dtype,
                start_idx=view.data_ptr() - self.buffer.data_ptr(),
                end_idx=view.data_ptr() - self.buffer.data_ptr() + view.nbytes,
                numel=view.nbytes,
            )
            for name, view in self.weights
        ]
        content = io.BytesIO()
        with _shared_by_name():
            bucket = {"flattened_tensor": self.buffer, "metadata": parts}
            _HandlePickler(content, pickle.HIGHEST_PROTOCOL).dump(bucket)
        return base64.b64encode(content.getvalue()).decode()


def read_payload(payload: str) -> list[NamedTensor]:
    """The tensors of a `Bucket.payload`.

    Raises PayloadError for anything but tensors: a pickle that names any function besides those that rebuild them
    is refused before the function is called.
    """
    try:
        return _parts(_TensorUnpickler(io.BytesIO(base64.b64decode(payload, validate=True))).load())
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, EOFError, RuntimeError) as error:
        raise PayloadError(f"the serialized tensors cannot be read: {error}") from error


_DEVICE = 6
"""The place of the GPU's number among what rebuilds a tensor from CUDA's handle. SGLang takes the UUID there too
(sglang.srt.utils.patch_torch)."""


class _HandlePickler(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_cuda):
            return NotImplemented
        rebuild, parts = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(value.device).uuid)
        return rebuild, (*parts[:_DEVICE], uuid, *parts[_DEVICE + 1 :])


@contextmanager
def _in_whole_segments() -> Iterator[None]:
    """Within it torch allocates GPU memory that CUDA has handles for, also where its segments are expandable."""
    if not segments_are_expandable():
        yield
        return
    torch._C._accelerator_setAllocatorSettings(EXPANDABLE.replace("True", "False"))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Within it torch shares memory by a name that any process can open, not by a descriptor of this one."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _parts(content: dict[str, Any]) -> list[NamedTensor]:
    buffer = content["flattened_tensor"]
    if not isinstance(buffer, Tensor):
        raise PayloadError(f"a {type(buffer).__name__} where a tensor should be")
    flat = buffer.view(torch.uint8)
    return [
        (part.name, flat[part.start_idx : part.end_idx].view(part.dtype).view(part.shape))
        for part in content["metadata"]
    ]


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
    ("types", "SimpleNamespace"),
} | {("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8")}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise PayloadError(f"{module}.{name} is no part of a tensor")
        return super().find_class(module, name)
