"""Work for several processes that meet, one a GPU: they end with it, and leave nothing on the GPUs."""

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from torch.distributed import FileStore, Store

from recipe.system.errors import USER_ERROR_STATUS, UserError
from recipe.system.files import atomic_write_text
from recipe.system.parent_death import end_with_parent

POLL_S = 0.1
GRACE_S = 10.0
"""Time that processes have to end when all have a result."""
FAILURE = "failure"


def together(what: str, count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results, which JSON can hold, of `work(rank, store, *arguments)` in `count` new processes. Raises UserError,
    which says that `what` cannot be measured, as soon as one of them fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="measure-") as name:
        folder = Path(name)
        processes = [
            context.Process(target=_carry_out, args=(rank, folder, count, work, arguments)) for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            _wait(what, processes, folder)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [json.loads((folder / str(rank)).read_text()) for rank in range(count)]


def _wait(what: str, processes: list[SpawnProcess], folder: Path) -> None:
    deadline = math.inf
    # By their ids: who manages the memory that they shared may outlive them, with what tells of their end.
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        if any(process.exitcode for process in processes):
            break
        if deadline == math.inf and all((folder / str(rank)).exists() for rank in range(len(processes))):
            deadline = time.monotonic() + GRACE_S
    if failed := next((process.exitcode for process in processes if process.exitcode), None):
        failure = folder / FAILURE
        told = failure.read_text() if failure.exists() else f"a process of it ended with status {failed}"
        raise UserError(f"{what} cannot be measured: {told}")


def _carry_out(rank: int, folder: Path, count: int, work: Callable[..., Any], arguments: tuple) -> None:
    end_with_parent()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    store: Store = FileStore(str(folder / "store"), count)
    try:
        atomic_write_text(folder / str(rank), json.dumps(work(rank, store, *arguments)))
    except (UserError, RuntimeError, OSError) as error:  # torch's of memory and of communication are RuntimeErrors
        told = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        atomic_write_text(folder / FAILURE, told + str(error).strip().partition("\n")[0])
        sys.exit(USER_ERROR_STATUS)
