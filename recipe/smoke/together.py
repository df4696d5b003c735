"""Work for several processes that meet, one a GPU: they end with it, and leave nothing on the GPUs."""

import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from torch.distributed import Store

from recipe.system.errors import USER_ERROR_STATUS, UserError
from recipe.system.files import atomic_write_text
from recipe.system.parent_death import end_with_parent
from recipe.system.ports import LOCAL
from recipe.system.tcp_store import join_store, open_store

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
        listener = socket.create_server((LOCAL, 0))
        port = listener.getsockname()[1]
        store = open_store(listener)
        processes = [
            context.Process(target=_carry_out, args=(rank, folder, port, work, arguments)) for rank in range(count)
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
        del store
        return [json.loads((folder / str(rank)).read_text()) for rank in range(count)]


def _wait(what: str, processes: list[SpawnProcess], folder: Path) -> None:
    """Until all have told their results, and have ended or had the time for it. Raises UserError for the first that
    cannot tell one."""
    results, failure = [folder / str(rank) for rank in range(len(processes))], folder / FAILURE
    deadline = math.inf
    # By their ids: who manages the memory that they shared may outlive them, with what tells of their end.
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline and not failure.exists():
        time.sleep(POLL_S)
        if any(process.exitcode and not result.exists() for process, result in zip(processes, results, strict=True)):
            break
        if deadline == math.inf and all(result.exists() for result in results):
            deadline = time.monotonic() + GRACE_S
    if failure.exists():
        raise UserError(f"{what} cannot be measured: {failure.read_text()}")
    silent = [process for process, result in zip(processes, results, strict=True) if not result.exists()]
    if ended := [process.exitcode for process in silent if process.exitcode is not None]:
        raise UserError(f"{what} cannot be measured: a process of it ended with status {ended[0]}")


def _carry_out(rank: int, folder: Path, port: int, work: Callable[..., Any], arguments: tuple) -> None:
    end_with_parent()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    try:
        store: Store = join_store(LOCAL, port)
        atomic_write_text(folder / str(rank), json.dumps(work(rank, store, *arguments)))
    except (UserError, RuntimeError, OSError) as error:  # torch's of memory and of communication are RuntimeErrors
        told = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        _tell_first(folder / FAILURE, told + str(error).strip().partition("\n")[0])
        sys.exit(USER_ERROR_STATUS)


def _tell_first(path: Path, text: str) -> None:
    """Writes it, unless another process has: what the first one says is the cause, not its end."""
    own = path.with_name(f"{path.name}-{os.getpid()}")
    own.write_text(text)
    with suppress(FileExistsError):
        os.link(own, path)
