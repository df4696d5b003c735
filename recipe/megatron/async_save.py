"""Checkpoints written while training goes on (`--async-save`): from a copy in host memory, by a thread of each rank."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from recipe.megatron.checkpoint import Shards
from recipe.system.heartbeat import heartbeat


class SaveInFlight:
    """The checkpoint that this rank is writing, if any. Its collectives have a process group of their own, so that they
    never meet the trainer's."""

    def __init__(self, timeout: timedelta) -> None:
        """Collective over all ranks."""
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._staged_bytes = 0

    @property
    def staged_bytes(self) -> int:
        """Host memory that the copy takes until it is written."""
        return self._staged_bytes

    def begin(self, shards: Shards, live: Iterable[Tensor], write: Callable[[dist.ProcessGroup], None]) -> None:
        """Copies those of the shards that lie on the device or in the memory of a `live` tensor, which training
        changes, and lets `write` write them in the thread. The save before it must be finished."""
        assert self._thread is None, "two saves at once"
        self._staged_bytes = stage(shards, live)
        device = torch.cuda.current_device()
        self._thread = Thread(target=self._run, args=(write, device), name="async save", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[dist.ProcessGroup], None], device: int) -> None:
        # A thread begins on the first device.
        torch.cuda.set_device(device)
        try:
            write(self._group)
        except Exception as error:
            self._failure = error
        self._staged_bytes = 0

    def wait(self) -> Exception | None:
        """Waits for the writing, in another thread than the trainer's, which may be stuck. Returns what it failed
        with."""
        if (thread := self._thread) is not None:
            thread.join()
        return self._failure

    def finish(self) -> None:
        """Waits for the writing. Raises what it failed with."""
        if self._thread is None:
            return
        with heartbeat.following(self._thread.ident):
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure


def stage(shards: Shards, live: Iterable[Tensor]) -> int:
    """Replaces the data of shards by copies in host memory, but for what is a copy there already. Returns the bytes of
    host memory that they hold now."""
    changing = {tensor.untyped_storage().data_ptr() for tensor in live}
    held: dict[int, int] = {}
    for shard in nested_values(shards):
        if shard.data.device.type != "cpu" or shard.data.untyped_storage().data_ptr() in changing:
            shard.data = shard.data.detach().to("cpu", copy=True)
        storage = shard.data.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
