"""The trainer as the loop sees it: one actor a rank, and verbs that all of them carry out together."""

import logging
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from recipe.batching.schedule import schedule
from recipe.cluster.calls import get
from recipe.cluster.placement import Placement
from recipe.cluster.rank_actor import ANSWERS, ByteArray, RankActor
from recipe.cluster.watch import WatchedCall, WatchedRank
from recipe.config import Architecture, Config
from recipe.engines.launch import POLLING_PROCESSES
from recipe.messages import Progress, RankPart, Scores, Started, StepReport, TrainSample
from recipe.plan.flops import sequence_cost
from recipe.system.threads import threads_each
from recipe.weight_sync.result import UpdateResult

logger = logging.getLogger(__name__)

MEANWHILE_S = 0.5
"""Between two looks at what starts beside the ranks."""


class TrainerGroup:
    """All ranks of the trainer. Use as a context manager: when an error ends the block, a checkpoint that is being
    written is finished."""

    def __init__(self, config: Config, architecture: Architecture, placement: Placement) -> None:
        self.config = config
        self.cost = sequence_cost(architecture)
        actor: Any = ray.remote(concurrency_groups={ANSWERS: 1})(RankActor)  # type: ignore[call-overload]
        self._ranks: list[ActorHandle] = [
            actor.options(name=f"training rank {rank}", **placement.for_rank(rank)).remote(
                config, architecture, rank, placement.gpu_of_rank(rank)
            )
            for rank in range(config.world_size)
        ]
        self._watched: list[WatchedRank] = []
        self._processes: list[ray.ObjectRef] = []
        self._starting: list[ray.ObjectRef] = []
        self._loading_compiler: list[ray.ObjectRef] = []
        self._save_in_flight = False
        self.is_well = True
        """No call to the ranks has failed."""
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
        self._processes = [rank.process.remote() for rank in self._ranks]
        for rank in self._ranks:
            rank.load_program.remote()
        store_address: ray.ObjectRef = self._ranks[0].open_store.remote(self.config.cluster.master_addr)
        threads = threads_per_rank(self.config)
        self._starting = [rank.start.remote(store_address, threads) for rank in self._ranks]
        if self.config.rollout.check_weight_update_equal:
            for rank in self._ranks:
                rank.load_checksums.remote()  # while the engines start

    def finish_start(self, meanwhile: Callable[[], None] = lambda: None) -> Started:
        """Waits for `begin_start`, and calls `meanwhile` again and again while it does. Returns how far the run has
        come, and the seconds of the slowest rank in each part."""
        processes = get(self._processes, self._names)
        self._watched = [WatchedRank(*rank) for rank in zip(self._names, processes, self._ranks, strict=True)]
        call = self._call(self._starting)
        while not call.advance(at_most_s=MEANWHILE_S):
            meanwhile()
        ranks: list[Started] = call.results()
        return Started(ranks[0].progress, {part: max(rank.seconds[part] for rank in ranks) for part in RankPart})

    def load_compiler(self) -> None:
        """Has the ranks import what their first step compiles kernels with, which takes seconds, while the engines
        generate: does not wait for it."""
        if not self._loading_compiler:
            self._loading_compiler = [rank.load_compiler.remote() for rank in self._ranks]

    def train_step(self, samples: Sequence[TrainSample]) -> StepReport:
        """One optimizer step on `samples`."""
        reports: list[StepReport] = self._all("train_step", self._shards(samples))
        shown = {index: values for report in reports for index, values in report.shown_log_probs.items()}
        return replace(reports[0], shown_log_probs=shown)

    def log_probs(self, samples: Sequence[TrainSample], *, of_reference: bool = False) -> Scores:
        """What the policy as it is, or the reference model, gives the samples."""
        return sum(self._all("log_probs", self._shards(samples), of_reference), Scores({}))

    def make_room(self) -> None:
        """Before engines on the trainer's GPUs take their memory again."""
        if self.config.cluster.colocate:
            self._all("make_room")

    def update_weights(self, engines: Mapping[int, str], version: str) -> UpdateResult:
        """Sends the policy, as `version`, to the engines at these addresses, by number. Returns what became of it."""
        first, *others = self._all("update_weights", dict(engines), version)
        result: UpdateResult = sum(others, first)
        return result

    def save(self, directory: Path, progress: Progress, *, beside_others: bool = False) -> None:
        """Writes a checkpoint or, with `--async-save`, begins to; older ones go by `--save-keep`, or stay where it is
        `beside_others`. Raises UserError if it, or the one before it, cannot be written."""
        directory.mkdir(parents=True, exist_ok=True)
        self._save_in_flight = self.config.checkpoint.async_save
        told = [progress, *[progress.counts] * (len(self._ranks) - 1)]  # the first rank writes it
        try:
            self._each("save", [(directory.resolve(), of_rank, beside_others) for of_rank in told])
        except SystemExit:  # it took too long: its end is not waited for again
            self._save_in_flight = False
            raise

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

    def _shards(self, samples: Sequence[TrainSample]) -> tuple[ByteArray, ...]:
        """The microbatches of every data-parallel rank, pickled: Ray would send each of the thousands of small arrays
        as a buffer of its own."""
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
        parts = [pickle.dumps([[samples[i] for i in pack] for pack in rank]) for rank in plan]
        return tuple(np.frombuffer(part, dtype=np.uint8) for part in parts)

    def _all(self, verb: str, *arguments: Any) -> list[Any]:
        shared = [ray.put(argument) if isinstance(argument, tuple) else argument for argument in arguments]
        return self._each(verb, [shared] * len(self._ranks))

    def _each(self, verb: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The results of one call to every rank, each with arguments of its own."""
        # A notice saves while a thread may send weights: every rank gets the two in the same order.
        with self._submitting:
            ranks = zip(self._ranks, arguments, strict=True)
            references = [getattr(rank, verb).remote(*of_rank) for rank, of_rank in ranks]
        try:
            return self._call(references).results()
        except Exception:
            self.is_well = False
            raise

    def _call(self, references: Sequence[ray.ObjectRef]) -> WatchedCall:
        report = self.config.run_dir.resolve() / "hung-ranks.txt"
        return WatchedCall(self._watched, references, self._timeout_s, report)

    @property
    def _timeout_s(self) -> float:
        return 60 * self.config.cluster.distributed_timeout_minutes

    @property
    def _names(self) -> list[str]:
        return [f"training rank {rank}" for rank in range(len(self._ranks))]


def threads_per_rank(config: Config) -> int:
    """CPU threads of a rank: as configured, or the machine's cores, shared by its ranks and SGLang's processes."""
    cluster = config.cluster
    if cluster.num_cpus_per_rank is not None:
        return max(1, int(cluster.num_cpus_per_rank))
    generates = config.needs_engine and config.rollout.engine == "sglang"
    return threads_each(cluster.actor_num_gpus_per_node, POLLING_PROCESSES if generates else 0)
