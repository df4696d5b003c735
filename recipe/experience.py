"""From graded rollouts to what the trainer learns from, and to what the run directory keeps."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, compress

import numpy as np
from numpy.typing import NDArray

from recipe.config import Config
from recipe.config.groups_training import GrpoConfig
from recipe.data.source import Draw
from recipe.generation.continuation import Decode
from recipe.grpo.advantages import (
    normalised_over_batch,
    normalises_over_batch,
    penalise_kl,
    response_advantages,
)
from recipe.grpo.mismatch import StepMismatch
from recipe.messages import OLDER_TOKENS, FloatArray, Scores, StepReport, TrainSample
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import Rollout
from recipe.run.directory import SampleRecord
from recipe.run.metrics import Scalar, Values, over_steps, source_metric
from recipe.run.shown_tokens import ShownTokens, pieces_of
from recipe.sampling.sample import NO_WEIGHTS, Sample, SampleGroup


def with_advantages(rollout: Rollout, config: Config) -> list[TrainSample]:
    """Every sample of a graded rollout with its advantage over its group, ready to be learned from."""
    shown = shown_groups(rollout, config.misc.keep_token_groups)
    return [
        TrainSample(
            index=sample.index,
            tokens=np.array(sample.tokens, dtype=np.int64),
            loss_mask=np.array(sample.loss_mask, dtype=np.bool_),
            advantages=np.full(sample.response_length, advantage, dtype=np.float32),
            rollout_log_probs=np.array(sample.rollout_log_probs, dtype=np.float32),
            sources=_sources(sample, rollout.weight_version),
            routed_experts=sample.routed_experts if config.grpo.replays_rollouts else None,
            is_shown=sample.index in shown,
        )
        for sample, advantage in zip(samples_of(rollout), advantages(rollout, config), strict=True)
    ]


def _sources(sample: Sample, version: str) -> NDArray[np.int64]:
    """[R] see `TrainSample.sources`. The tokens of one rollout are all from one engine; a sample that has none may be
    from a checkpoint, which does not say from which engine."""
    newest = OLDER_TOKENS if sample.engine is None else 1 + sample.engine
    current = np.array([made_under == version for made_under in sample.weight_versions], dtype=np.bool_)
    return np.where(current, newest, OLDER_TOKENS)


def samples_of(rollout: Rollout) -> list[Sample]:
    """All samples, group after group."""
    return [sample for group in rollout.groups for sample in group.samples]


def advantages(rollout: Rollout, config: Config) -> list[float]:
    """The advantage of each sample, group after group."""
    grpo = config.grpo
    normalise = not (grpo.disable_grpo_std_normalization or grpo.dr_grpo)
    return [
        advantage
        for group in rollout.groups
        for advantage in response_advantages(
            [None if sample.is_left_out else reward_of(sample) for sample in group.samples],
            grpo.advantage_estimator,
            std_normalization=normalise,
        )
    ]


def rewards_of(group: SampleGroup) -> list[float]:
    """The rewards of a graded group, without the samples that are left out."""
    return [reward_of(sample) for sample in group.samples if not sample.is_left_out]


def reward_of(sample: Sample) -> float:
    """The reward of a graded sample."""
    assert sample.reward is not None, f"sample {sample.index} was not graded"
    return sample.reward


def from_prompts(draws: Sequence[Draw]) -> list[TrainSample]:
    """Prompts with their given responses, to be learned by heart (sft)."""
    return [
        TrainSample(
            index=draw.number,
            tokens=np.array([*draw.prompt.ids, *draw.prompt.response_ids], dtype=np.int64),
            loss_mask=np.ones(len(draw.prompt.response_ids), dtype=np.bool_),
        )
        for draw in draws
    ]


def with_log_probs(
    samples: Sequence[TrainSample],
    old: Scores | None,
    reference: Scores | None,
    grpo: GrpoConfig,
) -> list[TrainSample]:
    """The samples with what passes over them told, and their final advantages: a KL in the reward (`kl_coef` > 0)
    lowers each token's by its log(policy / reference), and REINFORCE++ compares those of all tokens."""
    routed = {} if old is None else old.routed_experts
    result = [
        replace(
            sample,
            old_log_probs=None if old is None else old.log_probs[sample.index],
            ref_log_probs=None if reference is None else reference.log_probs[sample.index],
            routed_experts=routed.get(sample.index, sample.routed_experts),
        )
        for sample in samples
    ]
    if any(sample.advantages is None for sample in result):
        return result
    final = [_with_penalty(sample, grpo) for sample in result]
    if normalises_over_batch(grpo.advantage_estimator):
        final = normalised_over_batch(final, [sample.loss_mask for sample in result])
    return [replace(sample, advantages=one) for sample, one in zip(result, final, strict=True)]


def _with_penalty(sample: TrainSample, grpo: GrpoConfig) -> FloatArray:
    """[R] the advantages less the KL in the reward, if there is one; only trained tokens are penalised."""
    assert sample.advantages is not None
    if grpo.kl_coef == 0:
        return sample.advantages
    assert sample.old_log_probs is not None
    assert sample.ref_log_probs is not None
    to_go = grpo.advantage_estimator == "reinforce_plus_plus"
    old = np.where(sample.loss_mask, sample.old_log_probs, sample.ref_log_probs)
    return penalise_kl(sample.advantages, old, sample.ref_log_probs, grpo.kl_coef, to_go=to_go)


def optimizer_batches(samples: Sequence[TrainSample], config: Config) -> list[list[TrainSample]]:
    """The samples of each optimizer step, weighted in that step's loss."""
    size = config.global_batch_size
    batches = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
    return [_weighted(batch, config) for batch in batches]


def constant_length_scale(trainable_tokens: Sequence[int], length: int) -> float:
    """What the advantages of a batch are multiplied by for its tokens, which weigh 1 / (tokens of the batch), to count
    as if each weighed 1 / (sequences x length) (Dr. GRPO: arXiv:2503.20783, section 3.2)."""
    sequences = sum(count > 0 for count in trainable_tokens)
    return sum(trainable_tokens) / (sequences * length) if sequences else 0.0


def sequence_weights(trainable_tokens: Sequence[int], *, per_token: bool) -> list[float]:
    """The weight of a trainable token of each sequence, for all the sequences of one optimizer step.

    The denominators are those of the whole batch, and the tokens carry them as weights, so the loss is a plain sum over
    tokens: splitting the batch into any microbatches, packs or ranks and adding up changes nothing.

    `per_token`: every trainable token of the batch weighs the same (DAPO: Yu et al., arXiv:2503.14476, eq. 8).
    Otherwise every sequence does: the mean over its own tokens, then over sequences (GRPO: arXiv:2402.03300, eq. 3).
    Weights times token counts add up to 1. A sequence with no trainable token weighs 0 and is counted nowhere: a batch
    with it and without it has the same loss.
    """
    if per_token:
        tokens = sum(trainable_tokens)
        return [1 / tokens if count else 0.0 for count in trainable_tokens]
    sequences = sum(count > 0 for count in trainable_tokens)
    return [1 / (count * sequences) if count else 0.0 for count in trainable_tokens]


def _weighted(batch: list[TrainSample], config: Config) -> list[TrainSample]:
    grpo = config.grpo
    counts = [int(sample.loss_mask.sum()) for sample in batch]
    weights = sequence_weights(counts, per_token=grpo.calculate_per_token_loss or grpo.dr_grpo)
    mtp_weight = 1 / max(1, sum(int(sample.mtp_mask.sum()) for sample in batch))
    weighted = [
        replace(sample, weight=weight, mtp_weight=mtp_weight) for sample, weight in zip(batch, weights, strict=True)
    ]
    if not grpo.dr_grpo:
        return weighted
    scale = np.float32(constant_length_scale(counts, config.rollout.rollout_max_response_len))
    return [
        replace(sample, advantages=None if sample.advantages is None else scale * sample.advantages)
        for sample in weighted
    ]


def rollout_metrics(rollout_id: int, rollout: Rollout, engines: ClientCounters) -> Values:
    """What is reported of a graded rollout, from which the weights of version `rollout_id` learn, and of what went
    wrong with `engines` since the one before it."""
    samples = samples_of(rollout)
    by_group = [rewards for group in rollout.groups if (rewards := rewards_of(group))]
    rewards = [*chain.from_iterable(by_group)]
    lengths = [sample.generated_length for sample in samples]
    shortest, longest = np.percentile(lengths, (10, 90), method="nearest").tolist()
    low, high = _interval([statistics.fmean(of_group) for of_group in by_group])
    accept_rates = enumerate(rollout.metrics.accept_rates, start=1)
    return {
        "rollout_id": rollout_id,
        "samples": len(samples),
        "weight_version": rollout_id,
        "reward": statistics.fmean(rewards),
        "reward_ci95_low": low,
        "reward_ci95_high": high,
        "reward_std": statistics.pstdev(rewards),
        "zero_std_share": statistics.fmean(len(set(rewards_of(group))) <= 1 for group in rollout.groups),
        "response_length": rollout.metrics.mean_response_length,
        "response_length_p10": shortest,
        "response_length_p90": longest,
        "truncated_share": rollout.metrics.truncated_share,
        "grader_failed": sum(
            sample.grade is not None and sample.grade.status is GradeStatus.GRADER_FAILED for sample in samples
        ),
        "custom_generate_failed": engines.failed_samples,
        "dropped_groups": rollout.sampling.dropped_groups,
        "unused_groups": rollout.sampling.unused_groups,
        "refills": rollout.sampling.refills,
        "rollout_tokens_per_second": rollout.metrics.tokens_per_second,
        "stale_token_share": rollout.metrics.stale_share,
        **_staleness(rollout_id, samples),
        "engine_restarts": engines.restarts,
        "request_retries": engines.retries,
        "retried_tokens": engines.retried_tokens,
        "draft_accept_length": rollout.metrics.accept_length,
        **{f"draft_accept_rate_{depth}": rate for depth, rate in accept_rates},
        **_of_sources(rollout.groups),
    }


def _staleness(rollout_id: int, samples: Sequence[Sample]) -> dict[str, Scalar]:
    """By how many versions the weights that made the response tokens are older; None where there are no tokens."""
    counts = Counter(version for sample in samples for version in sample.weight_versions if version != NO_WEIGHTS)
    ages = {rollout_id - int(version): count for version, count in counts.items()}
    tokens = sum(ages.values())
    return {
        "staleness_mean": sum(age * count for age, count in ages.items()) / tokens if tokens else None,
        "staleness_max": max(ages, default=None),
    }


def _of_sources(groups: Sequence[SampleGroup]) -> dict[str, Scalar]:
    """What is reported of each prompt file that has rewards in a rollout, where a run has several."""
    by_source: dict[str, list[list[float]]] = {}
    for group in groups:
        if group.prompt.source and (rewards := rewards_of(group)):
            by_source.setdefault(group.prompt.source, []).append(rewards)
    values: dict[str, Scalar] = {}
    for name, of_groups in sorted(by_source.items()):
        values[source_metric(name)] = statistics.fmean(chain.from_iterable(of_groups))
        values[source_metric(name, "samples")] = sum(map(len, of_groups))
        values[source_metric(name, "zero_std_share")] = statistics.fmean(len(set(of_one)) == 1 for of_one in of_groups)
    return values


def _interval(means: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95% interval of the mean of groups' mean rewards, by the normal distribution: samples of one prompt are not
    independent, its groups are. None where there is one group."""
    if len(means) < 2:
        return None, None
    mean, half = statistics.fmean(means), 1.96 * statistics.stdev(means) / len(means) ** 0.5
    return mean - half, mean + half


def train_metrics(samples: Sequence[TrainSample], reports: Sequence[StepReport], skipped_steps: int) -> Values:
    """What is reported of the optimizer steps of one rollout."""
    mismatch = StepMismatch.of(reports)
    return {
        **over_steps([{**report.metrics, **report.of_rank} for report in reports]),
        "logprob_diff_older": None if mismatch is None else mismatch.older,
        "tokens": sum(sample.length for sample in samples),
        "skipped_steps": skipped_steps,
    }


def shown_groups(rollout: Rollout, count: int) -> set[int]:
    """The numbers of the samples of `count` groups that are worth a look: those that teach something first."""
    groups = sorted(rollout.groups, key=lambda group: len(set(rewards_of(group))) <= 1)
    return {sample.index for group in groups[:count] for sample in group.samples}


def shown_tokens(
    rollout: Rollout, learned: Sequence[TrainSample], of_trainer: Mapping[int, FloatArray], decode: Decode
) -> list[ShownTokens]:
    """The samples of a rollout that are shown token by token. `of_trainer` are log-probs before the rollout's first
    step, by sample, where `learned` has none."""
    found = []
    for line, (sample, trained) in enumerate(zip(samples_of(rollout), learned, strict=True)):
        if not trained.is_shown:
            continue
        assert trained.advantages is not None
        known = trained.old_log_probs if trained.old_log_probs is not None else of_trainer.get(sample.index)
        found.append(
            ShownTokens(
                line=line,
                pieces=pieces_of(sample.response_ids, decode),
                log_probs=[
                    log_prob if generated else None
                    for log_prob, generated in zip(sample.rollout_log_probs, sample.is_generated, strict=True)
                ],
                advantages=trained.advantages.tolist(),
                trainer_log_probs=None if known is None else known.tolist(),
            )
        )
    return found


def sample_records(rollout: Rollout, config: Config) -> list[SampleRecord]:
    """Every sample as the run directory keeps it."""
    return [
        _record(sample, advantage)
        for sample, advantage in zip(samples_of(rollout), advantages(rollout, config), strict=True)
    ]


def _record(sample: Sample, advantage: float) -> SampleRecord:
    assert sample.grade is not None
    assert sample.finish_reason is not None
    generated = [*compress(sample.rollout_log_probs, sample.is_generated)]
    return SampleRecord(
        index=sample.index,
        group_index=sample.group_index,
        prompt_index=sample.prompt.index,
        prompt=sample.prompt.text,
        response=sample.response,
        label=sample.prompt.label,
        prompt_length=len(sample.prompt_ids),
        response_length=sample.generated_length,
        environment_length=sample.response_length - sample.generated_length,
        finish_reason=sample.finish_reason,
        weight_versions=[int(version) for version in dict.fromkeys(sample.weight_versions) if version != NO_WEIGHTS],
        mean_log_prob=statistics.fmean(generated) if generated else None,
        reward=reward_of(sample),
        advantage=advantage,
        grade=sample.grade.status,
        answer=sample.grade.answer,
        source=sample.prompt.source,
    )
