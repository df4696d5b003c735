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

from recipe.config import Architecture, Config, resolve
from recipe.config.flags import parse_command_line
from recipe.config.loading import build_config, read_settings
from recipe.engines.launch import POLLING_PROCESSES
from recipe.smoke.random_model import fill_randomly
from recipe.system.threads import threads_each

if TYPE_CHECKING:
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

T = TypeVar("T")

RECIPE = "glm4.7-flash-8gpu"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CPU_ADAM = "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer"


class Ranks:
    """Processes that work together or each for itself, each with its GPU; on a CPU, with one thread. Use as a context
    manager. One that fails ends the others, which may wait for it."""

    def __init__(self, count: int, device: str) -> None:
        # On a CPU they are forked from one that has imported for all of them.
        context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        context.set_forkserver_preload(["recipe.megatron.rank"])
        self._pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(number, device))
            for number in range(count)
        ]
        self._rendezvous_folder = tempfile.TemporaryDirectory()
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
        self._rendezvous_folder.cleanup()

    def together(self, work: Callable[..., T], *arguments: Any) -> list[T]:
        """The results of `work(rendezvous, *arguments)` on every rank."""
        store, count = self._next_rendezvous(), len(self._pools)
        return _results(
            [pool.submit(_meet, rank, rank, count, store, work, arguments) for rank, pool in enumerate(self._pools)]
        )

    def apart(self, work: Callable[..., T], pieces: Sequence[tuple]) -> list[T]:
        """The results of `work(rendezvous, *piece)` for each of the pieces, by ranks that are alone; several are at it
        at a time."""
        count = len(self._pools)
        return _results(
            [
                self._pools[number % count].submit(_meet, 0, number % count, 1, self._next_rendezvous(), work, piece)
                for number, piece in enumerate(pieces)
            ]
        )

    def _next_rendezvous(self) -> str:
        self._met += 1
        return str(Path(self._rendezvous_folder.name) / str(self._met))


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


def alone(work: Callable[..., T], *arguments: object) -> T:
    """The result of `work` in a process of its own, which leaves nothing on the GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def recipe_config(folder: Path, ranks: int, flags: str = "", without: Sequence[str] = ()) -> Config:
    """RECIPE's training of the model in `folder`, on so many GPUs of one machine, the experts spread over all of them;
    `without` the settings whose dotted keys begin so. Nothing of it but the trainer will run, so that no rule on
    engines applies."""
    layout = f"--actor-num-gpus-per-node {ranks} --expert-model-parallel-size {ranks}"
    words = f"--recipe {RECIPE} --hf-checkpoint {folder} {layout} {flags}"
    settings = read_settings(parse_command_line(words.split()))
    left_out = ("sglang.", *without)
    return build_config({key: setting for key, setting in settings.items() if not key.startswith(left_out)})


def plain_config(folder: Path, flags: str) -> Config:
    """One GPU's training of the model in `folder` with nothing but `flags`."""
    words = (
        f"--hf-checkpoint {folder} --prompt-data /dev/null --rm-type math --num-rollout 1 --rollout-batch-size 1 "
        "--n-samples-per-prompt 2 --rollout-max-response-len 1024 --actor-num-gpus-per-node 1 --colocate --lr 1e-6 "
        f"--device cuda --use-dynamic-batch-size --max-tokens-per-gpu 8192 --rollout-engine embedded {flags}"
    )
    return resolve(words.split()).config


def build_rank(config: Config, rendezvous: "Rendezvous") -> "TrainerRank":
    """The rank, its weights whatever was in memory. On a GPU it computes with the threads that it has in a run."""
    import torch

    from recipe.megatron.rank import TrainerRank

    if torch.cuda.is_available():
        torch.set_num_threads(threads_each(config.cluster.actor_num_gpus_per_node, POLLING_PROCESSES))
    return TrainerRank(config, Architecture.from_checkpoint(config.model.hf_checkpoint), rendezvous)


def rank_alone(config: Config, *, load: bool = False) -> "TrainerRank":
    """A rank in this process, with the weights of its checkpoint or random ones."""
    from torch.distributed import HashStore

    from recipe.megatron.layout import Rendezvous

    rank = build_rank(config, Rendezvous(0, 0, 1, HashStore()))
    if load:
        rank.load()
    else:
        fill_randomly(rank)
    return rank


def step_optimizer(rank: "TrainerRank") -> None:
    """The optimizer's part of a training step."""
    from recipe.megatron.clipping import clipped_step, gradient_norms

    optimizer = rank.optimization.optimizer
    clipped_step(optimizer, gradient_norms(optimizer), rank.config.optimizer.clip_grad)
