"""The group in which weights are broadcast to engines on devices of their own: the trainer is rank 0, engines follow.

SGLang makes a process group beside the default one, which torch has no public function for where the members belong to
different jobs; both sides must do it in the same steps (sglang.srt.utils.init_custom_process_group).
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

from recipe.weight_sync.tensor import NamedTensor

TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """Where the members of a group find each other."""

    address: str
    port: int
    name: str
    world_size: int
    backend: str
    """gloo or nccl."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What an engine is told of a tensor before it comes."""

    name: str
    dtype: str
    """torch's name without the module: bfloat16."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Self:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def empty(self) -> Tensor:
        """A tensor of this kind, without content or memory."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


class BroadcastGroup:
    """One member's side of the group."""

    def __init__(self, update_group: UpdateGroup, rank: int, store: dist.Store) -> None:
        """Returns when all members are there. Raises RuntimeError if they are not in time."""
        self._group, _ = _new_process_group_helper(
            update_group.world_size,
            rank,
            [],
            dist.Backend(update_group.backend),
            dist.PrefixStore(update_group.name, store),
            group_name=GroupName(update_group.name),
            timeout=TIMEOUT,
        )
        _world.pg_group_ranks[self._group] = {member: member for member in range(update_group.world_size)}

    @classmethod
    def join(cls, update_group: UpdateGroup, rank: int) -> Self:
        """Joins as an engine."""
        return cls(update_group, rank, dist.TCPStore(update_group.address, update_group.port, timeout=TIMEOUT))

    def send(self, weights: Sequence[NamedTensor]) -> None:
        """Broadcasts the tensors' bytes, one after the other, from rank 0."""
        self._broadcast(torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in weights]))

    def receive(self, headers: Sequence[TensorHeader]) -> list[NamedTensor]:
        """The tensors that rank 0 sends."""
        kinds = [header.empty() for header in headers]
        flat = torch.empty(sum(kind.nbytes for kind in kinds), dtype=torch.uint8)
        self._broadcast(flat)
        parts = flat.split([kind.nbytes for kind in kinds])
        return [
            (header.name, part.clone().view(kind.dtype).view(kind.shape))
            for header, kind, part in zip(headers, kinds, parts, strict=True)
        ]

    def leave(self) -> None:
        """Ends this side of the group."""
        dist.destroy_process_group(self._group)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._group)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)


def open_group_store(address: str) -> tuple[int, dist.TCPStore]:
    """A store at `address`, which listens there only, and its port."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return port, dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=TIMEOUT
    )
