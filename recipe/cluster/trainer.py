"""The trainer as the loop sees it: one actor a rank, and verbs that all of them carry out together."""

import logging
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import RayError

from recipe.batching.schedule import schedule
from recipe.cluster.calls import get
from recipe.cluster.placement import Placement, own_address
from recipe.cluster.watch import WatchedCall, WatchedRank
from recipe.config import Architecture, Config
from recipe.config.engine_parts import parts_of, rank_beside
from recipe.heartbeat import Whereabouts, heartbeat
from recipe.messages import FloatArray, Progress, StepReport, TrainSample
from recipe.weights.cost import sequence_cost

if TYPE_CHECKING:
    from recipe.megatron.rank import TrainerRank
    from recipe.rollout.weights_sync import Delivery

logger = logging.getLogger(__name__)


_ANSWERS = "answers"
"""Ray's group of threads beside the one that works. Where there is such a group, Ray carries out all other methods, one
at a time, in one thread, which is not Python's main thread."""


class RankActor:
    """One training rank in a process of its own."""

    def __init__(self, config: Config, architecture: Architecture, rank: int, gpu: int | None) -> None:
        """`gpu`: the number of its GPU on its machine, if it has one."""
        self.config, self.architecture, self.rank, self.gpu = config, architecture, rank, gpu
        self.trainer: TrainerRank
        self.store: dist.Store | None = None
        self.weight_updates = 0

    def process(self) -> str:
        """This process and its machine, as a user finds them."""
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    @ray.method(concurrency_group=_ANSWERS)
    def whereabouts(self) -> Whereabouts:
        """How far it has come and where it is, told while it works."""
        return heartbeat.whereabouts()

    @ray.method(concurrency_group=_ANSWERS)
    def written(self) -> Exception | None:
        """Waits until a checkpoint in flight is written, whatever became of the rank's work. Returns what it failed
        with."""
        in_flight = self.trainer.save_in_flight
        return in_flight.wait() if in_flight is not None else None

    def open_store(self, address: str | None) -> tuple[str, int]:
        """Opens the store in which the ranks meet, here at `address` (default: `own_address`) and a
        port of its own. Returns both."""
        address = address or own_address(self.config)
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return address, port

    def start(self, address: str, port: int, threads: int) -> Progress | None:
        """Builds the rank, with the others that meet at `address` and `port`, and loads its weights. Rank 0 tells how
        far the run has come."""
        torch.set_num_threads(threads)
        os.environ.update(socket_interfaces(own_address(self.config)))
        heartbeat.follow_this_thread()
        from recipe.megatron.layout import Rendezvous
        from recipe.megatron.rank import TrainerRank

        self.store = self.store or dist.TCPStore(address, port)
        rendezvous = Rendezvous(self.rank, _device_index(self.gpu), self.config.world_size, self.store)
        self.trainer = TrainerRank(self.config, self.architecture, rendezvous)
        progress = self.trainer.load()
        self.make_room()
        return progress if self.rank == 0 else None

    def train_step(self, shards: bytes) -> StepReport:
        """One optimizer step; `shards` holds the microbatches of every data-parallel rank."""
        return self.trainer.train_step(self.trainer.own_shard(pickle.loads(shards)))

    def log_probs(self, shards: bytes, of_reference: bool) -> dict[int, FloatArray]:
        """Response log-probabilities of the policy or of the reference model."""
        own = self.trainer.own_shard(pickle.loads(shards))
        return self.trainer.reference_log_probs(own) if of_reference else self.trainer.log_probs(own)

    def update_weights(self, engines: Mapping[int, str], version: str) -> "Delivery":
        """Sends the policy to the engines at these addresses, by number, and tells what became of it; a collective."""
        delivery = self._send(engines, version)
        self.make_room()
        return delivery

    def make_room(self) -> None:
        """Engines on the trainer's GPU get the memory that torch keeps for the next training step."""
        if self.config.cluster.colocate:
            torch.cuda.empty_cache()

    def _send(self, engines: Mapping[int, str], version: str) -> "Delivery":
        """Rank 0 speaks to all engines, or each rank to those that begin on its machine or, where they share GPUs, on
        its own: they can open its memory."""
        from recipe.rollout.weights_relay import Relay, Share
        from recipe.rollout.weights_sync import Delivery, WeightSync

        sync = WeightSync.of(self.config, self.architecture, own_address(self.config))
        if sync.transfer == "disk":
            folder = self.config.run_dir.resolve() / "weights-on-their-way"
            self.trainer.export_hugging_face(folder)
            if self.rank:
                return Delivery()
            delivery = sync.load_from_disk(folder, list(engines.values()), version)
            shutil.rmtree(folder)
            return delivery
        self.weight_updates += 1
        weights = self.trainer.weights()
        if sync.transfer == "distributed":
            return sync.send(weights, list(engines.values()) if self.rank == 0 else [], version)
        shares = [
            Share(number, url, part.node_rank, part.nnodes, part.gpus)
            for number, url in engines.items()
            for part in parts_of(self.config, number)
            if rank_beside(self.config, part) == self.rank
        ]
        assert self.store is not None
        relay = Relay(
            dist.PrefixStore(f"weights/{self.weight_updates}", self.store),
            [share for share in shares if share.nnodes > 1],
            timedelta(minutes=self.config.cluster.distributed_timeout_minutes),
        )
        return sync.send(weights, [share.url for share in shares if share.node_rank == 0], version, relay)

    def save(self, directory: Path, progress: Progress) -> None:
        """Writes a checkpoint or, with `--async-save`, begins to."""
        self.trainer.save(directory, progress)

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if any."""
        self.trainer.finish_save()

    def export_hugging_face(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint."""
        self.trainer.export_hugging_face(directory)

    def host_memory(self) -> dict[str, int]:
        """Bytes of host memory in use, by part."""
        return self.trainer.host_memory()


def _device_index(gpu: int | None) -> int:
    """torch's number of a GPU, which counts those that this process sees."""
    if gpu is None or torch.cuda.device_count() <= 1:
        return 0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",").index(str(gpu)) if seen else gpu


class TrainerGroup:
    """All ranks of the trainer. Use as a context manager: when an error ends the block, a checkpoint that is being
    written is finished."""

    def __init__(self, config: Config, architecture: Architecture, placement: Placement) -> None:
        self.config = config
        self.cost = sequence_cost(architecture)
        actor: Any = ray.remote(concurrency_groups={_ANSWERS: 1})(RankActor)  # type: ignore[call-overload]
        self._ranks: list[ActorHandle] = [
            actor.options(name=f"training rank {rank}", **placement.for_rank(rank)).remote(
                config, architecture, rank, placement.gpu_of_rank(rank)
            )
            for rank in range(config.world_size)
        ]
        self._watched: list[WatchedRank] = []
        self._starting: list[ray.ObjectRef] = []
        self._save_in_flight = False
        self._submitting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # Who interrupts a run does not want to wait.
        if self._save_in_flight and isinstance(error, Exception):
            writing: list[ray.ObjectRef] = [rank.written.remote() for rank in self._ranks]
            for reference in ray.wait(writing, num_returns=len(writing), timeout=self._timeout_s)[0]:
                with suppress(RayError):
                    if (failure := ray.get(reference)) is not None:
                        logger.warning("%s", failure)

    def begin_start(self) -> None:
        """Creates the ranks, and lets them build themselves and load without waiting for that."""
        processes = get([rank.process.remote() for rank in self._ranks], self._names)
        self._watched = [WatchedRank(*rank) for rank in zip(self._names, processes, self._ranks, strict=True)]
        first, *_ = self._ranks
        [(address, port)] = get([first.open_store.remote(self.config.cluster.master_addr)], ["training rank 0"])
        threads = threads_per_rank(self.config)
        self._starting = [rank.start.remote(address, port, threads) for rank in self._ranks]

    def finish_start(self) -> Progress:
        """Waits for `begin_start`. Returns how far the run has come."""
        progress: Progress = self._results(self._starting)[0]
        return progress

    def train_step(self, samples: Sequence[TrainSample]) -> StepReport:
        """One optimizer step on `samples`."""
        return self._all("train_step", self._shards(samples))[0]

    def log_probs(self, samples: Sequence[TrainSample], *, of_reference: bool = False) -> dict[int, FloatArray]:
        """Response log-probabilities [R] by sample index, of the policy as it is or of the reference model."""
        found: dict[int, FloatArray] = {}
        for part in self._all("log_probs", self._shards(samples), of_reference):
            found |= part
        return found

    def make_room(self) -> None:
        """Before engines on the trainer's GPUs take their memory again."""
        if self.config.cluster.colocate:
            self._all("make_room")

    def update_weights(self, engines: Mapping[int, str], version: str) -> "Delivery":
        """Sends the policy, as `version`, to the engines at these addresses, by number. Returns what became of it."""
        first, *others = self._all("update_weights", dict(engines), version)
        delivery: Delivery = sum(others, first)
        return delivery

    def save(self, directory: Path, progress: Progress) -> None:
        """Writes a checkpoint or, with `--async-save`, begins to. Raises UserError if it, or the one before it, cannot
        be written."""
        directory.mkdir(parents=True, exist_ok=True)
        self._save_in_flight = self.config.checkpoint.async_save
        self._all("save", directory.resolve(), progress)

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if any. Raises UserError if it cannot be."""
        if self._save_in_flight:
            self._save_in_flight = False
            self._all("finish_save")

    def export_hugging_face(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._all("export_hugging_face", directory.resolve())

    def host_memory(self) -> list[dict[str, int]]:
        """Bytes of host memory that the ranks of each machine use now, by part."""
        found, per_machine = self._all("host_memory"), self.config.cluster.actor_num_gpus_per_node
        machines = [found[first : first + per_machine] for first in range(0, len(found), per_machine)]
        return [{part: sum(rank[part] for rank in ranks) for part in ranks[0]} for ranks in machines]

    def _shards(self, samples: Sequence[TrainSample]) -> bytes:
        """The microbatches of every data-parallel rank, as one string of bytes: Ray would send each of the thousands of
        small arrays as a buffer of its own."""
        perf = self.config.perf
        plan = schedule(
            [sample.length for sample in samples],
            data_parallel_size=self.config.data_parallel_size,
            max_tokens=perf.max_tokens_per_gpu * perf.context_parallel_size
            if perf.use_dynamic_batch_size and perf.max_tokens_per_gpu
            else None,
            micro_batch_size=perf.micro_batch_size,
            count_multiple=perf.microbatch_multiple,
            cost=self.cost if perf.balance_data else None,
        )
        return pickle.dumps([[[samples[i] for i in pack] for pack in rank] for rank in plan])

    def _all(self, verb: str, *arguments: Any) -> list[Any]:
        shared = [ray.put(argument) if isinstance(argument, bytes | Progress) else argument for argument in arguments]
        # A notice saves while a thread may send weights: every rank gets the two in the same order.
        with self._submitting:
            references = [getattr(rank, verb).remote(*shared) for rank in self._ranks]
        return self._results(references)

    def _results(self, references: Sequence[ray.ObjectRef]) -> list[Any]:
        report = self.config.run_dir.resolve() / "hung-ranks.txt"
        return WatchedCall(self._watched, references, self._timeout_s, report).results()

    @property
    def _timeout_s(self) -> float:
        return 60 * self.config.cluster.distributed_timeout_minutes

    @property
    def _names(self) -> list[str]:
        return [f"training rank {rank}" for rank in range(len(self._ranks))]


def socket_interfaces(address: str) -> dict[str, str]:
    """Variables that bind gloo and NCCL to the interface with this machine's `address`: by themselves they take what
    the host's name resolves to, often an address that no other machine reaches. What the user has set stays."""
    interfaces = (name for name, entries in psutil.net_if_addrs().items() if address in (e.address for e in entries))
    names = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} - os.environ.keys()
    return dict.fromkeys(names, next(interfaces)) if names else {}


def threads_per_rank(config: Config) -> int:
    """CPU threads of a rank: as configured, or the machine's cores shared by its ranks."""
    if config.cluster.num_cpus_per_rank is not None:
        return max(1, int(config.cluster.num_cpus_per_rank))
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // config.cluster.actor_num_gpus_per_node)
