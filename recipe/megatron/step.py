"""Forward and backward over a rank's microbatches: one optimizer step, or the log-probabilities of given samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from recipe.config import Config
from recipe.grpo.kl import KLEstimator
from recipe.grpo.loss import (
    LossMetrics,
    PolicyLossConfig,
    PolicyLossInputs,
    Surrogate,
    policy_loss,
    sft_loss,
)
from recipe.grpo.sequences import (
    CUSTOM_TIS,
    Sequences,
    WeightFunction,
    custom_weights,
    engine_log_ratio,
    off_policy_kept,
    sequence_log_ratio,
)
from recipe.megatron import gradients
from recipe.megatron.device import to_training_device
from recipe.megatron.microbatch import MicroBatch, TokenLayout, build_microbatch
from recipe.megatron.model import ModelOutput, PolicyModel
from recipe.megatron.routing_record import RoutingRecord
from recipe.messages import FloatArray, Scores, SourceDifference, TrainSample
from recipe.system.heartbeat import heartbeat
from recipe.system.imports import load_function

Microbatches = Sequence[Sequence[TrainSample]]


def token_layout(with_mtp: bool, moe_layers: tuple[int, ...] = ()) -> TokenLayout:
    """This rank's share of a pack."""
    return TokenLayout(
        with_mtp=with_mtp,
        moe_layers=moe_layers,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        token_multiple=parallel_state.get_tensor_model_parallel_world_size(),
    )


def policy_loss_config(config: Config) -> PolicyLossConfig:
    """The loss that this run's flags describe."""
    grpo = config.grpo
    surrogates = {one.value: one for one in Surrogate}
    return PolicyLossConfig(
        surrogate=surrogates.get(grpo.advantage_estimator, Surrogate.PPO),
        eps_clip=grpo.eps_clip,
        eps_clip_high=grpo.eps_clip_high,
        eps_clip_c=grpo.eps_clip_c,
        entropy_coef=grpo.entropy_coef,
        kl_loss_coef=grpo.kl_loss_coef if grpo.use_kl_loss else 0.0,
        kl_estimator=KLEstimator(grpo.kl_loss_type),
        use_tis=grpo.use_tis,
        tis_masks=grpo.tis_mode == "mask",
        tis_clip=grpo.tis_clip,
        tis_clip_low=grpo.tis_clip_low,
        num_sources=1 + config.num_engines,
    )


@dataclass(frozen=True)
class LossFunction:
    """The loss of a pack, as megatron's schedule calls it on the last pipeline stage."""

    config: PolicyLossConfig
    is_sft: bool
    mtp_scale: float | None
    """Weight of the MTP layer's loss; None where it is not trained."""
    tis_level: str = "token"
    opsm_delta: float | None = None
    """For off-policy sequence masking; None: there is none."""
    custom_tis: WeightFunction | None = None

    @classmethod
    def of(cls, config: Config) -> Self:
        """The loss that this run's flags describe. Raises UserError if a function of the user's cannot be had."""
        grpo, mtp = config.grpo, config.mtp
        custom = grpo.custom_tis_function_path
        return cls(
            config=policy_loss_config(config),
            is_sft=config.is_sft,
            mtp_scale=mtp.mtp_loss_scaling_factor if mtp.enable_mtp_training else None,
            tis_level=grpo.tis_level if grpo.use_tis else "token",
            opsm_delta=grpo.opsm_delta if grpo.use_opsm else None,
            custom_tis=None if custom is None else load_function(CUSTOM_TIS, custom),
        )

    def over_sequences(self, inputs: PolicyLossInputs, batch: MicroBatch) -> PolicyLossInputs:
        """With what whole sequences say of their tokens."""
        sequences = _sequences(batch)
        if self.config.surrogate is Surrogate.GSPO:
            inputs = replace(inputs, sequence_log_ratio=sequence_log_ratio(inputs, sequences))
        if self.tis_level != "token":
            mean = self.tis_level == "geometric"
            inputs = replace(inputs, engine_log_ratio=engine_log_ratio(inputs, sequences, mean=mean))
        if self.opsm_delta is not None:
            inputs = replace(inputs, kept=off_policy_kept(inputs, sequences, self.opsm_delta))
        if self.custom_tis is not None:
            inputs = replace(inputs, custom_weights=custom_weights(inputs, sequences, self.custom_tis))
        return inputs

    def __call__(self, batch: MicroBatch, output: ModelOutput) -> tuple[Tensor, Tensor, LossMetrics]:
        """(loss, tokens, metrics): the loss already carries the whole batch's denominators, so tokens count nothing."""
        if self.is_sft:
            result = sft_loss(output.log_probs, batch.weights)
        else:
            assert batch.advantages is not None
            inputs = PolicyLossInputs(
                log_probs=output.log_probs,
                advantages=batch.advantages,
                weights=batch.weights,
                old_log_probs=batch.old_log_probs,
                rollout_log_probs=batch.rollout_log_probs,
                ref_log_probs=batch.ref_log_probs,
                entropy=output.entropy,
                sources=batch.sources,
            )
            result = policy_loss(self.over_sequences(inputs, batch), self.config)
        loss, metrics = result.loss, result.metrics
        if output.mtp_log_probs is not None:
            assert batch.mtp_weights is not None
            assert self.mtp_scale is not None
            mtp_loss = sft_loss(output.mtp_log_probs, batch.mtp_weights).loss
            loss = loss + self.mtp_scale * mtp_loss
            metrics = replace(metrics, scalars={**metrics.scalars, "mtp_loss": mtp_loss.detach()})
        return loss, torch.zeros((), dtype=torch.int), metrics


def _sequences(batch: MicroBatch) -> Sequences:
    """Those of a pack, which context-parallel ranks have parts of."""

    def over_ranks(sums: Tensor) -> Tensor:
        if parallel_state.get_context_parallel_world_size() > 1:
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        return sums

    lengths = tuple(batch.response_lengths.tolist())
    starts = np.cumsum([0, *lengths[:-1]])
    return Sequences(
        sample_of=to_training_device(batch.sample_of),
        places=to_training_device(starts[batch.sample_of] + batch.offset_of),
        lengths=lengths,
        trained=to_training_device(batch.trained_lengths),
        over_ranks=over_ranks,
    )


def _run(
    chunks: Sequence[DistributedDataParallel] | Sequence[PolicyModel],
    microbatches: Microbatches,
    loss_function: Callable[[MicroBatch, ModelOutput], object],
    *,
    forward_only: bool,
    with_mtp: bool = False,
    replays: bool = True,
    on_forward: Callable[[PolicyModel, MicroBatch], None] = lambda *_: None,
) -> list:
    """megatron's schedule over the microbatches. `replays`: the routers are told what the samples say. `on_forward` is
    called with each chunk and pack when the one has read the other."""

    def batches(model: PolicyModel) -> Iterator[MicroBatch]:
        layout = token_layout(with_mtp and model.mtp_process, model.moe_layers if replays else ())
        for samples in microbatches:
            heartbeat.beat()
            yield build_microbatch(samples, layout)

    def forward_step(batch_of: Iterator[MicroBatch], chunk: DistributedDataParallel | PolicyModel) -> tuple:
        batch = next(batch_of)
        output = chunk(batch.inputs)
        on_forward(unwrap_model(chunk, DistributedDataParallel), batch)
        return output, partial(loss_function, batch)

    iterators = [batches(unwrap_model(chunk, DistributedDataParallel)) for chunk in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


@dataclass(frozen=True)
class MetricsOnDevice:
    """Metrics of a whole batch that the GPU is still working on."""

    loss: LossMetrics | None
    """None on pipeline stages before the last."""
    shown: tuple[tuple[Sequence[TrainSample], MicroBatch, Tensor], ...] = ()
    """This rank's packs with samples that are shown, and the log-probs of their response tokens."""

    def read(self) -> tuple[dict[str, float], tuple[SourceDifference, ...]]:
        """Waits for them; every rank has to ask, and is told the same."""
        told = [None if self.loss is None else (self.loss.values(), self.loss.source_differences())]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(told, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        assert told[0] is not None
        return told[0]

    def shown_log_probs(self) -> dict[int, FloatArray]:
        """[R] log-probs of this rank's samples that are shown, by their index."""
        found: dict[int, FloatArray] = {}
        for samples, batch, log_probs in self.shown:
            shown = {sample.index for sample in samples if sample.is_shown}
            by_sample = _by_sample(samples, batch, log_probs)
            found |= {index: values for index, values in by_sample.items() if index in shown}
        return found


def forward_backward(
    chunks: Sequence[DistributedDataParallel], microbatches: Microbatches, loss_function: LossFunction
) -> MetricsOnDevice:
    """Accumulates the gradients of `microbatches` and sums them over data-parallel ranks. Where a rank works alone, it
    returns before the GPU has."""
    for chunk in chunks:
        gradients.begin(chunk)
    shown: list[tuple[Sequence[TrainSample], MicroBatch, Tensor]] = []
    in_order = iter(microbatches)

    def loss(batch: MicroBatch, output: ModelOutput) -> tuple[Tensor, Tensor, LossMetrics]:
        samples = next(in_order)
        if any(sample.is_shown for sample in samples):
            shown.append((samples, batch, output.log_probs.detach()))
        return loss_function(batch, output)

    with_mtp = loss_function.mtp_scale is not None
    results = _run(chunks, microbatches, loss, forward_only=False, with_mtp=with_mtp)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return MetricsOnDevice(None)
    return MetricsOnDevice(_over_ranks(results), tuple(shown))


def _over_ranks(results: list[LossMetrics]) -> LossMetrics:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def reduce(vector: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(vector, op=op, group=group)
        return vector

    return sum(results[1:], start=results[0]).reduced(
        lambda vector: reduce(vector, dist.ReduceOp.SUM), lambda vector: reduce(vector, dist.ReduceOp.MAX)
    )


def response_scores(
    chunks: Sequence[PolicyModel],
    microbatches: Microbatches,
    *,
    replays: bool = True,
    records_routing: bool = False,
) -> Scores:
    """Log-probabilities of each sample's response under the weights as they are, from the last pipeline stage and, with
    `records_routing`, the experts of every stage's layers; both from tensor- and context-parallel rank 0, nothing from
    the others. `replays`: the routers are told what the samples say."""
    routing = RoutingRecord(chunks) if records_routing else None

    def collect(batch: MicroBatch, output: ModelOutput) -> tuple[Tensor, Tensor, tuple[MicroBatch, Tensor]]:
        return output.log_probs.sum(), torch.zeros((), dtype=torch.int), (batch, output.log_probs)

    with torch.no_grad():
        on_forward = routing.add if routing is not None else lambda *_: None
        results = _run(chunks, microbatches, collect, forward_only=True, replays=replays, on_forward=on_forward)
    found: dict[int, FloatArray] = {}
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for samples, (batch, log_probs) in zip(microbatches, results, strict=True):
            found |= _by_sample(samples, batch, log_probs)
    routed = routing.by_sample(microbatches) if routing is not None else {}
    speaks = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    return Scores(found, routed) if speaks else Scores({})


def _by_sample(samples: Sequence[TrainSample], batch: MicroBatch, log_probs: Tensor) -> dict[int, FloatArray]:
    """The pack's log-probabilities cut by sample; each context-parallel rank adds the tokens that it computed."""
    lengths = [sample.response_length for sample in samples]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    place = starts[torch.from_numpy(batch.sample_of)] + torch.from_numpy(batch.offset_of)
    whole = log_probs.new_zeros(sum(lengths))
    whole[place.to(whole.device)] = log_probs
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    parts = whole.cpu().split(lengths)
    return {sample.index: part.numpy().copy() for sample, part in zip(samples, parts, strict=True)}


def finalize_gradients(model: list, num_tokens: Tensor | None = None, **groups: Any) -> None:
    """megatron's finish of the gradients, without its division by tokens: the loss holds its denominators."""
    gradients.finish(model)
    finalize_model_grads(model, None, **groups)
