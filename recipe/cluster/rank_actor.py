"""A training rank as Ray carries it: a process of its own, which torch and megatron are loaded in. The driver knows the
class only, and needs neither."""

import os
import pickle
import shutil
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray
from numpy.typing import NDArray

from recipe.cluster.placement import nccl_settings, own_address, socket_interfaces
from recipe.config import Architecture, Config
from recipe.config.engine_placement import weight_sources
from recipe.messages import Progress, RankPart, Scores, Started, StepReport
from recipe.system.heartbeat import RankLocation, heartbeat
from recipe.system.stopwatch import Stopwatch
from recipe.system.tcp_store import join_store, open_store
from recipe.weight_sync.result import UpdateResult

if TYPE_CHECKING:
    from torch.distributed import Store

    from recipe.megatron.rank import TrainerRank

ByteArray = NDArray[np.uint8]
"""Bytes that Ray's store hands out where they lie, without a copy for each process."""

ANSWERS = "answers"
"""Ray's group of threads beside the one that works. Where there is such a group, Ray carries out all other methods, one
at a time, in one thread, which is not Python's main thread."""


class RankActor:
    """One training rank in a process of its own."""

    def __init__(self, config: Config, architecture: Architecture, rank: int, gpu: int | None) -> None:
        """`gpu`: the number of its GPU on its machine, if it has one."""
        self.config, self.architecture, self.rank, self.gpu = config, architecture, rank, gpu
        self.trainer: TrainerRank
        self.store: Store | None = None
        self.stopwatch = Stopwatch()
        self.weight_updates = 0

    def process(self) -> str:
        """This process and its machine, as a user finds them."""
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    @ray.method(concurrency_group=ANSWERS)
    def location(self) -> RankLocation:
        """How far it has come and where it is, told while it works."""
        return heartbeat.location()

    @ray.method(concurrency_group=ANSWERS)
    def written(self) -> Exception | None:
        """Waits until a checkpoint in flight is written, whatever became of the rank's work. Returns what it failed
        with."""
        in_flight = self.trainer.save_in_flight
        return in_flight.wait() if in_flight is not None else None

    def open_store(self, address: str | None) -> tuple[str, int]:
        """Opens the store in which the ranks meet, here at `address` (default: `own_address`) and a
        port of its own. Returns both."""
        address = address or own_address(self.config)
        self.store = open_store(socket.create_server((address, 0)))
        return address, self.store.port

    def load_program(self) -> None:
        """Imports torch and megatron."""
        heartbeat.follow_this_thread()
        self.stopwatch.restart()
        import_module("recipe.megatron.rank")
        self.stopwatch.lap(RankPart.IMPORTS)

    def start(self, store_address: tuple[str, int], threads: int) -> Started:
        """Builds the rank, with the others that meet at this address and port, and loads its weights."""
        import torch

        from recipe.megatron.layout import Rendezvous, local_rank
        from recipe.megatron.rank import TrainerRank

        self.stopwatch.restart()
        torch.set_num_threads(threads)
        os.environ.update(socket_interfaces(own_address(self.config)) | nccl_settings(self.config))
        self.store = self.store or join_store(*store_address)
        rendezvous = Rendezvous(self.rank, local_rank(self.gpu), self.config.world_size, self.store)
        self.trainer = TrainerRank(self.config, self.architecture, rendezvous, self.stopwatch)
        progress = self.trainer.load()
        self.make_room()
        return Started(progress, {part: self.stopwatch.seconds[part] for part in RankPart})

    def load_checksums(self) -> None:
        """Imports what weight updates are compared by."""
        import torch

        if torch.cuda.is_available():
            from recipe.weight_sync.checksum import gpu_hash

            gpu_hash()

    def load_compiler(self) -> None:
        """Imports what the first step compiles kernels with."""
        self.trainer.load_compiler()

    def train_step(self, shards: Sequence[ByteArray]) -> StepReport:
        """One optimizer step; `shards` has the pickled microbatches of each data-parallel rank."""
        return self.trainer.train_step(pickle.loads(self.trainer.own_shard(shards).data))

    def log_probs(self, shards: Sequence[ByteArray], of_reference: bool) -> Scores:
        """What the policy or the reference model gives the samples."""
        own = pickle.loads(self.trainer.own_shard(shards).data)
        return self.trainer.reference_log_probs(own) if of_reference else self.trainer.log_probs(own)

    def update_weights(self, engines: Mapping[int, str], version: str) -> UpdateResult:
        """Sends the policy to the engines at these addresses, by number, and tells what became of it; a collective."""
        result = self._send(engines, version)
        self.make_room()
        return result

    def make_room(self) -> None:
        """Engines on the trainer's GPU get the memory that torch keeps for the next training step."""
        if self.config.cluster.colocate:
            self.trainer.empty_cache()

    def _send(self, engines: Mapping[int, str], version: str) -> UpdateResult:
        """Rank 0 speaks to all engines, or each rank to those that begin on its machine or, where they share GPUs, on
        its own."""
        from recipe.weight_sync.relay import Recipient, Relay
        from recipe.weight_sync.sync import WeightSync

        sync = WeightSync.of(self.config, self.architecture, own_address(self.config))
        if sync.transfer == "disk":
            folder = self.config.run_dir.resolve() / "weights-on-their-way"
            self.trainer.export_hugging_face(folder)
            if self.rank:
                return UpdateResult()
            result = sync.load_from_disk(folder, engines, version)
            shutil.rmtree(folder)
            return result
        self.weight_updates += 1
        weights = self.trainer.weights()
        if sync.transfer == "distributed":
            return sync.send(weights, engines if self.rank == 0 else {}, version)
        assert self.store is not None
        relay = Relay(
            self.store,
            self.weight_updates,
            self.rank,
            [Recipient(number, url, weight_sources(self.config, number)) for number, url in engines.items()],
            timedelta(minutes=self.config.cluster.distributed_timeout_minutes),
        )
        return sync.send(weights, relay.engines, version, relay)

    def save(self, directory: Path, progress: Progress, beside_others: bool) -> None:
        """Writes a checkpoint or, with `--async-save`, begins to."""
        self.trainer.save(directory, progress, beside_others=beside_others)

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if any."""
        self.trainer.finish_save()

    def export_hugging_face(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint."""
        self.trainer.export_hugging_face(directory)

    def host_memory(self) -> dict[str, int]:
        """Bytes of host memory in use, by part."""
        return self.trainer.host_memory()
