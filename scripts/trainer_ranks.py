"""Training ranks without Ray, for measurements: in processes that live over several pieces of work, one a GPU."""

import gc
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from recipe.config import Resolved

if TYPE_CHECKING:
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

T = TypeVar("T")


class Ranks:
    """Processes that work together or each for itself, each with its GPU; on a CPU, with one thread. Use as a context
    manager. One that fails ends the others, which may wait for it."""

    def __init__(self, count: int, device: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare, initargs=(number, device))
            for number in range(count)
        ]
        self._meetings = tempfile.TemporaryDirectory()
        self._met = 0

    def __enter__(self) -> Self:
        """Returns while the processes still load what they need."""
        for pool in self._pools:
            pool.submit(_load)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _end_all()
        for pool in self._pools:
            pool.shutdown()
        self._meetings.cleanup()

    def together(self, work: Callable[..., T], *arguments: Any) -> list[T]:
        """The results of `work(rendezvous, *arguments)` on every rank."""
        store, count = self._next_meeting(), len(self._pools)
        return _results(
            [pool.submit(_meet, rank, rank, count, store, work, arguments) for rank, pool in enumerate(self._pools)]
        )

    def apart(self, work: Callable[..., T], pieces: Sequence[tuple]) -> list[T]:
        """The results of `work(rendezvous, *piece)` for each of the pieces, by ranks that are alone; several are at it
        at a time."""
        count = len(self._pools)
        return _results(
            [
                self._pools[number % count].submit(_meet, 0, number % count, 1, self._next_meeting(), work, piece)
                for number, piece in enumerate(pieces)
            ]
        )

    def _next_meeting(self) -> str:
        self._met += 1
        return str(Path(self._meetings.name) / str(self._met))


def _prepare(number: int, device: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")  # megatron's advice, for speed
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(number)
        torch.set_float32_matmul_precision("highest")
        # The same functions are compiled for several precisions and numbers of heads in one process.
        torch._dynamo.config.recompile_limit = 64


def _load() -> None:
    import recipe.megatron.rank  # noqa: F401


def _meet(rank: int, local_rank: int, count: int, store: str, work: Callable[..., T], arguments: Sequence[Any]) -> T:
    from torch.distributed import FileStore

    from recipe.megatron.layout import Rendezvous

    for choice in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(choice, None)  # megatron leaves its choice of attention there, and insists on it

    result = work(Rendezvous(rank, local_rank, count, FileStore(store, count)), *arguments)
    gc.collect()
    return result


def _results(futures: Sequence[Future[T]]) -> list[T]:
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        if (error := future.exception()) is not None:
            _end_all()
            raise error
    return [future.result() for future in futures]


def _end_all() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def build_rank(resolved: Resolved, rendezvous: "Rendezvous") -> "TrainerRank":
    """The rank, its weights whatever was in memory."""
    from recipe.megatron.rank import TrainerRank

    return TrainerRank(resolved.config, resolved.architecture, rendezvous)
