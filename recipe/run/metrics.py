"""Every metric of a run, under the name that it has from where it is computed to metrics.jsonl.

python -m recipe.run.metrics --schema      the JSON schema of a line of metrics.jsonl
python -m recipe.run.metrics --markdown    the table, a row a metric

A new metric is an entry of METRICS and the line that computes it: of a loss's tokens in `recipe.grpo.loss`, of an
optimizer step in `recipe.megatron.rank`, of a rollout in `recipe.experience`, of an evaluation set in
`evaluation.in_loop`. What was not measured is absent, a value that is not finite is null.

Every metric that holds a time or a rate starts with `seconds_` or ends in `_per_second`, and no other does: two runs of
the same seed give the same lines but for those.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import itemgetter
from typing import Any

from recipe.run.phases import StepSeconds
from recipe.system.errors import UserError, run_main

Scalar = int | float | None
"""A value of a metric; None where it was not measured or, in a line of metrics.jsonl, is not finite."""
Values = Mapping[str, Scalar]
"""What was measured, by name."""


class Reduction(StrEnum):
    """How the values of tokens, microbatches, ranks and optimizer steps become one."""

    MEAN = "mean"
    """Over tokens by their weight in the loss, whichever microbatch and rank they are on, then over optimizer steps."""
    MAXIMUM = "maximum"
    SUM = "sum"
    LAST = "last"
    """The value of the last optimizer step."""


@dataclass(frozen=True)
class Metric:
    """What a metric is."""

    unit: str
    """"1" where there is none; "share" is between 0 and 1; "number" tells one thing from another."""
    reduction: Reduction | None
    """None: computed once, from everything that it is about."""
    sentence: str
    terminal: str = ""
    """How a terminal shows it, as a format; empty: not at all."""
    hides_zero: bool = False
    """Whether a terminal leaves it out where it is 0."""


MEAN, MAXIMUM, SUM, LAST = Reduction

METRICS: dict[str, Metric] = {
    "step": Metric("number", None, "The loop's step: a rollout and what follows; 0 is the evaluation before."),
    # Of a rollout.
    "rollout_id": Metric("number", None, "The rollout, counted from 0."),
    "samples": Metric("samples", SUM, "Samples of the rollout."),
    "weight_version": Metric("number", None, "The version of the weights that learn from the samples."),
    "reward": Metric("reward", MEAN, "Mean reward of the samples.", "reward {:.3f}"),
    "reward_ci95_low": Metric("reward", None, "Lower bound of the 95% interval of `reward`, over groups."),
    "reward_ci95_high": Metric("reward", None, "Upper bound of the 95% interval of `reward`, over groups."),
    "reward_std": Metric("reward", None, "Standard deviation of the reward over all samples."),
    "zero_std_share": Metric("share", MEAN, "Groups whose rewards are all equal, which teach nothing."),
    "response_length": Metric("tokens", MEAN, "Mean tokens generated for a sample.", "length {:.1f}"),
    "response_length_p10": Metric("tokens", None, "`response_length` that a tenth of the samples does not reach."),
    "response_length_p90": Metric("tokens", None, "`response_length` that a tenth of the samples exceeds."),
    "truncated_share": Metric("share", MEAN, "Responses cut at the length limit.", "truncated {:.1%}", hides_zero=True),
    "grader_failed": Metric("samples", SUM, "Samples whose grader failed.", "grader failed {}", hides_zero=True),
    "custom_generate_failed": Metric(
        "samples",
        SUM,
        "Samples that `--custom-generate-function-path` failed at since the end of the last rollout.",
        "generate failed {}",
        hides_zero=True,
    ),
    "dropped_groups": Metric("groups", SUM, "Groups that the dynamic sampling filter dropped."),
    "unused_groups": Metric("groups", SUM, "Groups that were not needed: aborted, or finished too late."),
    "refills": Metric("times", SUM, "Times that prompts had to be drawn again."),
    "rollout_tokens_per_second": Metric(
        "tokens/s", None, "Tokens that the current weights made, a second of the rollout."
    ),
    "stale_token_share": Metric(
        "share", MEAN, "Response tokens that older weights made (`--partial-rollout`, `--async-rollout`)."
    ),
    "staleness_mean": Metric("versions", MEAN, "Versions that the weights of a response token lie behind, on average."),
    "staleness_max": Metric("versions", MAXIMUM, "Versions that the oldest response token's weights lie behind."),
    "draft_accept_length": Metric("tokens", MEAN, "Tokens an engine's step brings a sequence, with speculation."),
    "draft_accept_rate_DEPTH": Metric(
        "share", MEAN, "Engine's steps in which the draft token of this depth is accepted."
    ),
    "engine_restarts": Metric("engines", SUM, "Engines that were started again since the end of the last rollout."),
    "request_retries": Metric("requests", SUM, "Requests that were sent again since the end of the last rollout."),
    "retried_tokens": Metric(
        "tokens", SUM, "Tokens of the answers to repeated requests: at most so many were made twice."
    ),
    # Of each prompt file, where there are several.
    "source/NAME": Metric("reward", MEAN, "Mean reward of a prompt file's samples, if `--prompt-data` has several."),
    "source/NAME_samples": Metric("samples", SUM, "Samples of the file in the rollout."),
    "source/NAME_zero_std_share": Metric("share", MEAN, "Groups of the file whose rewards are all equal."),
    # Of the optimizer steps on it.
    "loss": Metric("1", MEAN, "The loss whose gradient is taken, without the MTP layer's.", "loss {:.4f}"),
    "grad_norm": Metric("1", LAST, "Norm of the policy's gradient before clipping.", "grad norm {:.3f}"),
    "policy_loss": Metric("1", MEAN, "The clipped surrogate, with the weights of truncated importance sampling."),
    "ratio": Metric("1", MEAN, "Probability of a token under the policy over that before the rollout's first step."),
    "clip_share": Metric("share", MEAN, "Tokens whose gradient the PPO clip removed."),
    "dual_clip_share": Metric("share", MEAN, "Tokens whose loss `--eps-clip-c` bounded."),
    "policy_kl": Metric("nats/token", MEAN, "k1 estimate of KL(policy before the rollout's steps || policy)."),
    "tis_weight": Metric("1", MEAN, "Importance weight against the engine."),
    "tis_clip_share": Metric("share", MEAN, "Tokens whose importance weight was beyond its bounds."),
    "opsm_share": Metric("share", MEAN, "Tokens that off-policy sequence masking left out (`--use-opsm`)."),
    "entropy": Metric("nats/token", MEAN, "Entropy of the policy.", "entropy {:.3f}"),
    "kl": Metric("nats/token", MEAN, "KL to the reference model, by the estimator of `--kl-loss-type`."),
    "logprob_diff_mean": Metric("nats/token", MEAN, "|trainer's log-prob - engine's| before the step."),
    "logprob_diff_max": Metric("nats/token", MAXIMUM, "The largest |trainer's log-prob - engine's|."),
    "logprob_diff_older": Metric("nats/token", None, "Mean |trainer's log-prob - engine's| of older weights' tokens."),
    "logprob_kl": Metric("nats/token", MEAN, "k3 estimate of KL(engine || trainer)."),
    "logprob_beyond_2": Metric("share", MEAN, "Tokens of which trainer and engine differ by more than a factor of 2."),
    "logprob_beyond_10": Metric(
        "share", MEAN, "Tokens of which trainer and engine differ by more than a factor of 10."
    ),
    "routing_disagreement": Metric(
        "share",
        MEAN,
        "Response tokens that a router would take to another expert than the one replayed, mean over layers.",
    ),
    "mtp_loss": Metric("nats/token", MEAN, "Cross-entropy of the MTP layer, mean over the tokens that it learns."),
    "mtp_grad_norm": Metric("1", LAST, "Norm of the MTP layer's gradient before clipping, no part of `grad_norm`."),
    "lr": Metric("1", LAST, "Learning rate."),
    "tokens": Metric("tokens", SUM, "Prompt and response tokens trained on."),
    "skipped_steps": Metric(
        "steps",
        None,
        "Optimizer steps left out since the run began: gradients not finite.",
        "skipped {}",
        hides_zero=True,
    ),
    "max_memory_allocated": Metric("bytes", MAXIMUM, "Most GPU memory of the first rank's tensors in training."),
    "max_memory_reserved": Metric("bytes", MAXIMUM, "Most GPU memory that torch held for the first rank in training."),
    # Of each evaluation set.
    "eval/NAME": Metric("reward", None, "Share of right answers to a set; mean of a custom reward."),
    "eval/NAME_ci95_low": Metric("reward", None, "Lower bound of the 95% confidence interval of `eval/NAME`."),
    "eval/NAME_ci95_high": Metric("reward", None, "Upper bound of the 95% confidence interval of `eval/NAME`."),
    "eval/NAME_samples": Metric("samples", SUM, "Samples of the set."),
    "eval/NAME_response_length": Metric("tokens", MEAN, "Mean tokens generated for a sample of the set."),
    "eval/NAME_truncated_share": Metric("share", MEAN, "Responses of the set cut at the length limit."),
    "eval/NAME_no_answer_share": Metric("share", MEAN, "Responses that ended by themselves without an answer."),
    "eval/NAME_grader_failed_share": Metric("share", MEAN, "Responses of the set whose grader failed."),
    "eval/NAME_pass_at_n": Metric("share", MEAN, "Prompts of the set of which at least one of the n samples is right."),
    "eval/NAME_maj_at_n": Metric("share", MEAN, "Prompts of the set of which the commonest answer is right."),
    # Rates and times.
    "tokens_per_second": Metric("tokens/s", None, "`tokens` by the step's time without evaluating and saving."),
    "samples_per_second": Metric("samples/s", None, "`samples` by the step's time without evaluating and saving."),
    "weight_bytes_per_second": Metric("bytes/s", None, "The model's weights, to each GPU of the slowest engine."),
    "seconds_step": Metric("s", None, "Wall time of the whole step."),
    "seconds_rollout": Metric("s", SUM, "Time in which the loop waits for a rollout: groups are generated and graded."),
    "seconds_engines_idle": Metric(
        "s", SUM, "Time in which no sample was under way at the engines, measured with `--async-rollout`."
    ),
    "seconds_log_probs": Metric("s", SUM, "Time of passes without gradients: old and reference log-probs."),
    "seconds_train": Metric("s", SUM, "Time of forward, backward and optimizer."),
    "seconds_forward_backward": Metric(
        "s", SUM, "Of `seconds_train`: forward and backward passes on the first rank, and the gradient's norm."
    ),
    "seconds_optimizer": Metric(
        "s", SUM, "Of `seconds_train`: AdamW in host memory on the first rank; on a GPU, until it is under way."
    ),
    "seconds_update_weights": Metric("s", SUM, "Time in which new weights go to the engines."),
    "seconds_paused": Metric(
        "s", None, "Of `seconds_update_weights`: generation stood still (`--update-weight-in-flight`)."
    ),
    "seconds_eval": Metric("s", SUM, "Time of answering held-out prompts."),
    "seconds_save": Metric("s", SUM, "Time in which the checkpoint of the step before is written."),
}
"""Capitals in a name stand for what differs: the name of an evaluation set or a prompt file, a number."""

_CAPITALS = {"NAME": ".+", "DEPTH": "[1-9][0-9]*"}
"""Regular expressions of what a line has instead of the capitals in a name of METRICS."""


def metric_of(name: str) -> Metric:
    """The entry of a metric. Raises UserError if there is none."""
    if name in METRICS:
        return METRICS[name]
    fitting = [general for general in METRICS if re.fullmatch(_pattern(general), name)]
    if not fitting:
        raise _not_in_table(name)
    return METRICS[max(fitting, key=len)]  # eval/NAME_samples is no set of that name


def reduction_of(name: str, *possible: Reduction) -> Reduction:
    """How a metric is reduced. Raises UserError if it is in no table, or its reduction is none of the `possible`."""
    reduction = metric_of(name).reduction
    if reduction not in possible:
        told = f"the metric {name!r} is computed where it can be reduced by {', '.join(possible)}"
        raise UserError(f"{told}: METRICS in recipe/run/metrics.py says {reduction}")
    return reduction


def over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the optimizer steps of a rollout measured, reduced over those of them that measured it. Raises UserError for
    a metric that is in no table."""
    reduce: dict[Reduction, Callable[[Sequence[float]], float]]
    reduce = {MEAN: statistics.fmean, MAXIMUM: max, SUM: sum, LAST: itemgetter(-1)}
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: reduce[reduction_of(name, *reduce)]([step[name] for step in steps if name in step]) for name in names}


def eval_metric(of_set: str, value: str = "reward") -> str:
    """The name of a value of an evaluation set: `eval/NAME` for its mean reward, `eval/NAME_VALUE` for another. Raises
    UserError if it is in no table."""
    return _named("eval", of_set, value)


def source_metric(of_file: str, value: str = "reward") -> str:
    """As `eval_metric`, of a prompt file: `source/NAME` and `source/NAME_VALUE`."""
    return _named("source", of_file, value)


def _named(kind: str, name: str, value: str) -> str:
    general = f"{kind}/NAME" if value == "reward" else f"{kind}/NAME_{value}"
    if general not in METRICS:
        raise _not_in_table(general)
    return general.replace("NAME", name)


def _not_in_table(name: str) -> UserError:
    return UserError(f"the metric {name!r} is computed, but is in no table: add it to METRICS in recipe/run/metrics.py")


def _pattern(general: str) -> str:
    for capitals, pattern in _CAPITALS.items():
        general = general.replace(capitals, pattern)
    return general


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What was measured in step n, the loop's n-th rollout and all that follows from it; step 0 is the evaluation
    before the first."""

    step: int
    values: Values = field(default_factory=dict)
    """Values of the rollout and of its optimizer steps, by the names of METRICS; empty in step 0."""
    evals: Mapping[str, Values] = field(default_factory=dict)
    """Values of each evaluation set, by its name: the values that `eval_metric` names."""
    seconds: StepSeconds

    def as_line(self) -> dict[str, Scalar]:
        """The line of metrics.jsonl. Raises UserError for a metric that is in no table."""
        line: dict[str, Scalar] = {"step": self.step, **self.values}
        for of_set, values in self.evals.items():
            line |= {eval_metric(of_set, value): measured for value, measured in values.items()}
        for counted in ("tokens", "samples"):
            if (count := self.values.get(counted)) is not None:
                line[f"{counted}_per_second"] = count / self.seconds.training
        line["seconds_step"] = self.seconds.step
        line |= {f"seconds_{phase}": seconds for phase, seconds in self.seconds.phases.items()}
        for name in line:
            metric_of(name)
        return {name: value if math.isfinite(value) else None for name, value in line.items() if value is not None}


def shown(line: Values) -> list[str]:
    """What a terminal shows of a line, in the table's order."""
    return [
        metric.terminal.format(math.nan if line[name] is None else line[name])
        for name, metric in METRICS.items()
        if metric.terminal and name in line and not (metric.hides_zero and line[name] == 0)
    ]


def schema() -> dict[str, Any]:
    """The JSON schema of a line of metrics.jsonl."""
    exact, general = {}, {}
    for name, metric in METRICS.items():
        reduced = f", {metric.reduction}" if metric.reduction else ""
        value = {"type": ["number", "null"], "description": f"{metric.sentence} [{metric.unit}{reduced}]"}
        if (pattern := _pattern(name)) == name:
            exact[name] = value
        else:
            general[f"^{pattern}$"] = value
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of metrics.jsonl: null is a value that is not finite, what was not measured is absent",
        "type": "object",
        "properties": exact,
        "patternProperties": general,
        "required": ["step", "seconds_step"],
        "additionalProperties": False,
    }


def markdown() -> str:
    """The table as documentation has it."""
    rows = [("name", "unit", "reduction", "what"), ("---",) * 4]
    rows += [
        (f"`{name}`", metric.unit, metric.reduction or "", metric.sentence.replace("|", r"\|"))
        for name, metric in METRICS.items()
    ]
    return "\n".join("".join(f"| {cell} " for cell in row) + "|" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The metrics of a run.")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--schema", action="store_true", help="the JSON schema of a line of metrics.jsonl")
    form.add_argument("--markdown", action="store_true", help="the table, a row a metric")
    print(json.dumps(schema(), indent=1) if parser.parse_args().schema else markdown())


if __name__ == "__main__":
    run_main(main)
