"""Work for several processes that meet, one a GPU: they end with it, and leave nothing on the GPUs."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from torch.distributed import FileStore, Store
from torch.multiprocessing.spawn import ProcessException

from recipe.system.errors import UserError
from recipe.system.parent_death import end_with_parent


def together(what: str, count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results, which JSON can hold, of `work(rank, store, *arguments)` in `count` new processes. Raises UserError
    if one of them fails, which is told as having measured `what`."""
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        context = mp.spawn(_carry_out, (folder, count, work, arguments), nprocs=count, join=False)
        assert context is not None
        try:
            while not context.join():
                pass
        except ProcessException as error:
            raise UserError(f"{what} cannot be measured: {str(error).strip().splitlines()[-1]}") from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]


def _carry_out(rank: int, folder: str, count: int, work: Callable[..., Any], arguments: tuple) -> None:
    end_with_parent()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    store: Store = FileStore(f"{folder}/store", count)
    Path(folder, f"{rank}.json").write_text(json.dumps(work(rank, store, *arguments)))
