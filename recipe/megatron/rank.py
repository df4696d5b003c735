"""What one training rank can do: the verbs that the loop calls, with nothing of Ray or of rollouts in them."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from recipe.config import Architecture, Config
from recipe.grpo.sequences import check_custom_weights
from recipe.megatron import checkpoint
from recipe.megatron.async_save import SaveInFlight
from recipe.megatron.clipping import clipped_step, gradient_norms
from recipe.megatron.layout import Rendezvous
from recipe.megatron.optimizer import build_optimization, host_bytes, wrap_data_parallel
from recipe.megatron.policy_rank import PolicyRank
from recipe.megatron.routing import routing_disagreement
from recipe.megatron.step import (
    LossFunction,
    Microbatches,
    finalize_gradients,
    forward_backward,
    response_scores,
)
from recipe.megatron.weights import named_weights
from recipe.messages import Progress, RankPart, Scores, StepReport
from recipe.system.errors import UserError
from recipe.system.heartbeat import heartbeat
from recipe.system.stopwatch import Stopwatch
from recipe.weights.checkpoints import find_start

T = TypeVar("T")

ROUNDED_UP = 1.02
"""By torch's allocator."""


class TrainerRank(PolicyRank):
    """One process of the trainer: its shard of the policy, of the optimizer and, if a KL term needs it, of the
    reference model, which rests in host memory."""

    def __init__(
        self, config: Config, architecture: Architecture, rendezvous: Rendezvous, stopwatch: Stopwatch | None = None
    ) -> None:
        """`stopwatch` is given the parts of the start."""
        super().__init__(config, architecture, rendezvous, stopwatch)
        transformer = self.chunks[0].config
        self.replicas = wrap_data_parallel(transformer, self.chunks, config)
        self.stopwatch.lap(RankPart.MODEL)
        self.optimization = build_optimization(self.replicas, config)
        self.stopwatch.lap(RankPart.OPTIMIZER)
        transformer.finalize_model_grads_func = finalize_gradients
        transformer.grad_scale_func = self.optimization.optimizer.scale_loss
        self.loss_function = LossFunction.of(config)
        self.reference: dict[str, Tensor] = {}
        self.peak_bytes = 0
        """GPU memory that tensors took at the fullest moment of the last step."""
        self.save_in_flight: SaveInFlight | None = None
        if config.checkpoint.async_save:
            self.save_in_flight = SaveInFlight(timedelta(minutes=config.cluster.distributed_timeout_minutes))

    def load(self) -> Progress:
        """Takes the training checkpoint or the weights that `--load` names, or else the starting weights, `--ref-load`
        or `--hf-checkpoint`; see `find_start`. Returns how far the run has come; but for the first rank, its counts."""
        settings, start = self.config.checkpoint, find_start(self.config)
        if self.config.needs_reference or (start.checkpoint is None and start.weights is None):
            self.load_weights(settings.ref_load or self.config.model.hf_checkpoint)
        if self.config.needs_reference:
            self.reference = {name: weight.cpu().clone() for name, weight in named_weights(self.chunks).items()}
        if start.checkpoint is not None and not settings.no_load_optim:
            progress = checkpoint.load(start.checkpoint, self.chunks, self.optimization)
            self.stopwatch.lap(RankPart.WEIGHTS)
            return progress
        if chosen := start.checkpoint or start.weights:
            self.load_weights(chosen)
        self.stopwatch.lap(RankPart.WEIGHTS)
        self.optimization.begin()
        self.stopwatch.lap(RankPart.OPTIMIZER)
        return checkpoint.read_progress(start.checkpoint) if start.checkpoint else Progress()

    def own_shard(self, shards: Sequence[T]) -> T:
        """This data-parallel rank's one, of those of all."""
        return shards[parallel_state.get_data_parallel_rank()]

    def log_probs(self, microbatches: Microbatches) -> Scores:
        reserve(self.peak_bytes)
        return super().log_probs(microbatches)

    def reference_log_probs(self, microbatches: Microbatches) -> Scores:
        """What the reference model gives the samples, whose tokens it routes by itself."""
        reserve(self.peak_bytes)
        with self._reference_weights():
            return response_scores(self.chunks, microbatches, replays=False)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        weights = named_weights(self.chunks)
        policy = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.reference[name])
            try:
                yield
            finally:
                for name, weight in weights.items():
                    weight.copy_(policy[name])

    def train_step(self, microbatches: Microbatches) -> StepReport:
        """One optimizer step on this rank's microbatches of a batch; none, on any rank, where gradients are not finite.
        Returns while the GPU is still at it: the next batch is prepared meanwhile."""
        began, learning_rate = time.perf_counter(), self.optimization.learning_rate
        reserve(self.peak_bytes)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        routing = [replay for chunk in self.chunks for replay in chunk.routing]
        for replay in routing:
            replay.restart()
        metrics_on_device = forward_backward(self.replicas, microbatches, self.loss_function)
        heartbeat.beat()
        norms = gradient_norms(self.optimization.optimizer)
        metrics, by_source = metrics_on_device.read()
        if self.loss_function.custom_tis is not None:
            check_custom_weights(metrics["tis_weight"])
        if self.config.grpo.replays_routing and (share := routing_disagreement(routing)) is not None:
            metrics["routing_disagreement"] = share
        passed = time.perf_counter()  # the GPU has: its figures were read
        if taken := norms.are_finite:
            clipped_step(self.optimization.optimizer, norms, self.config.optimizer.clip_grad)
            self.optimization.scheduler.step(increment=1)
        metrics |= {"grad_norm": norms.policy, "lr": learning_rate}
        if "mtp_loss" in metrics:
            metrics["mtp_grad_norm"] = norms.mtp
        of_rank = {"seconds_forward_backward": passed - began, "seconds_optimizer": time.perf_counter() - passed}
        if torch.cuda.is_available():
            of_rank["max_memory_allocated"] = self.peak_bytes = torch.cuda.max_memory_allocated()
            of_rank["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        return StepReport(metrics, not taken, by_source, of_rank, metrics_on_device.shown_log_probs())

    def save(self, directory: Path, progress: Progress, *, beside_others: bool = False) -> None:
        """Writes a checkpoint or, with `--async-save`, begins to: training may go on, and `finish_save` waits for it.
        The first rank has the whole `progress`, which it writes; the others need its counts. Older ones go by
        `--save-keep` then, or stay where it is `beside_others`. Raises UserError if the checkpoint, or the one before
        it, cannot be written; the older ones stay."""
        keep, failure = self.config.checkpoint.save_keep, None
        try:
            self.finish_save()
        except UserError as error:
            failure = error
        shards = checkpoint.own_shards(self.chunks, self.optimization)

        def write(group: dist.ProcessGroup | None) -> None:
            with _writing_errors_told(directory, progress):
                checkpoint.save(directory, shards, progress, keep, group, beside_others=beside_others)

        if self.save_in_flight is None:
            write(None)
        else:
            weights = (tensor for chunk in self.chunks for tensor in (*chunk.parameters(), *chunk.buffers()))
            self.save_in_flight.begin(shards, (*weights, *self.optimization.state_tensors), write)
        if failure is not None:
            raise failure

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if any. Raises UserError if it cannot be."""
        if self.save_in_flight is not None:
            self.save_in_flight.finish()

    def load_compiler(self) -> None:
        """Imports what kernels are compiled with, where the first step compiles any."""
        if torch.cuda.is_available():
            torch.compile(lambda: None)

    def empty_cache(self) -> None:
        """Gives the GPU memory back that torch keeps for the next step."""
        torch.cuda.empty_cache()

    def host_memory(self) -> dict[str, int]:
        """Bytes of host memory that this rank's tensors take, by part; what a save gathers for a moment is not among
        them."""
        reference = host_bytes(self.reference.values())
        buffers = (buffer for replica in self.replicas for buffer in replica.buffers + replica.expert_parallel_buffers)
        return {
            "weights": host_bytes(weight for chunk in self.chunks for weight in chunk.parameters()),
            "gradients": host_bytes(buffer.grad_data for buffer in buffers),
            "optimizer state": host_bytes(self.optimization.state_tensors),
            "reference model": reference,
            "policy, while the reference model is used": reference,
            "checkpoint in flight": self.save_in_flight.staged_bytes if self.save_in_flight else 0,
        }

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and leaves the process groups."""
        self.finish_save()
        super().close()


@contextmanager
def _writing_errors_told(directory: Path, progress: Progress) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        free = shutil.disk_usage(directory).free
        raise UserError(
            f"the checkpoint of rollout {progress.rollouts} cannot be written to {directory} "
            f"({type(error).__name__}, {free / 1e9:.1f} GB free there): free some space and start again with "
            "--load; the last good checkpoint is whole"
        ) from error


def missing_bytes(peak: int, allocated: int, reserved: int) -> int:
    """What a step whose tensors take `peak` bytes lacks, where `allocated` are taken and torch has `reserved`; 0 if it
    has half of what it needs besides."""
    needed = int(ROUNDED_UP * max(0, peak - allocated))
    return needed if reserved - allocated < needed / 2 else 0


def reserve(peak: int) -> None:
    """Gets the memory of a step like the last one in one piece, where an engine has had it since. torch would get it
    piece by piece, each by a call of the driver."""
    if not torch.cuda.is_available():
        return
    missing = missing_bytes(peak, torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    if missing:
        with suppress(torch.OutOfMemoryError):
            torch.empty(missing, dtype=torch.uint8, device="cuda")
