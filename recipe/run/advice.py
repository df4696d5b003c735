"""What to turn in a run that goes wrong: rules over its newest steps, with a reason each.

The terminal, the page of `make watch` and the report say the same: all three give the steps of a run, one after the
other, to an `Adviser`.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipe.run.conditions import Conditions
from recipe.run.metrics import Values

WINDOW = 5
"""Newest steps that a rule looks at, where it does not say otherwise."""
UNPLANNED_S = 5.0
"""Seconds that a step may take beyond its plan: starting kernels and requests is not planned, and is most of a tiny
model's step."""


@dataclass(frozen=True)
class Advice:
    """Something to turn."""

    rule: str
    step: int
    """After which it was found first, of the present stretch of steps."""
    sentence: str
    """What is the matter and what to turn."""
    reason: str
    """Why that helps."""
    page: str
    """Of the documentation, from the repository's root."""


@dataclass(frozen=True)
class Stretch:
    """What the rules look at."""

    first: tuple[Values, ...]
    """The first steps of the run, at most WINDOW."""
    last: tuple[Values, ...]
    """The newest, at most WINDOW."""
    least_difference: float | None
    """The least mean over WINDOW steps of `logprob_diff_mean` so far."""
    before: Values
    """The evaluation before the first step."""
    evaluated: Values
    """The newest evaluation's line."""
    conditions: Conditions | None
    """Of the newest step that had a rollout."""
    busy_shares: tuple[float, ...]
    """`Conditions.busy_share` of the newest steps."""
    config: Mapping[str, Any]
    """The run's, as its manifest has it."""
    planned_step_s: float | None
    """The longest that a step was planned to take, in seconds."""

    def mean(self, name: str, *, first: bool = False) -> float | None:
        """Of a metric over the newest steps, or the first; None where fewer than WINDOW have it."""
        values = [value for line in (self.first if first else self.last) if (value := line.get(name)) is not None]
        return sum(values) / WINDOW if len(values) == WINDOW else None


Found = tuple[str, str]
"""Sentence and reason."""


def _truncated(of: Stretch) -> Found | None:
    share, longest = of.mean("truncated_share"), of.config["rollout"]["rollout_max_response_len"]
    if share is None or share < 0.3:
        return None
    return (
        f"truncated {share:.0%}: raise --rollout-max-response-len (now {longest:,})",
        "a response that is cut has no answer, so its reward says that thinking longer is wrong",
    )


def _nothing_to_learn(of: Stretch) -> Found | None:
    share, reward = of.mean("zero_std_share"), of.mean("reward")
    if share is None or reward is None or share < 0.7 or of.config["rollout"]["dynamic_sampling_filter_path"]:
        return None
    kind = "too easy" if reward > 0.5 else "too hard"
    return (
        f"{share:.0%} of the groups teach nothing, as all their rewards are equal: the prompts are {kind}; take "
        "others, raise --n-samples-per-prompt, or replace such groups with --dynamic-sampling-filter-path "
        "check_reward_nonzero_std",
        "an advantage is a reward's distance from its group's mean, and that is 0",
    )


def _entropy(of: Stretch) -> Found | None:
    now, then, reward = of.mean("entropy"), of.mean("entropy", first=True), of.mean("reward")
    if now is None or then is None or reward is None or now > 0.2 * then or reward > 0.9:
        return None
    return (
        f"the entropy has fallen from {then:.3f} to {now:.3f} nats a token at a reward of {reward:.2f}: raise "
        "--eps-clip-high (0.28 is DAPO's), set --entropy-coef, or lower --lr",
        "a policy that is sure of every token draws the same responses again, and learns nothing from them",
    )


def _difference(of: Stretch) -> Found | None:
    now, least = of.mean("logprob_diff_mean"), of.least_difference
    if now is None or least is None or now < 0.01 or now < 2 * least:
        return None
    return (
        f"trainer and engines disagree by {now:.3f} nats a token, up from {least:.3f}: `make mismatch` tells why",
        "what is learned is of another policy than the one that answered",
    )


def _idle_engines(of: Stretch) -> Found | None:
    rollout, step = of.mean("seconds_rollout"), of.mean("seconds_step")
    if len(of.busy_shares) < WINDOW or rollout is None or step is None or rollout < step / 3:
        return None
    if of.config["rollout"]["partial_rollout"] or of.config["rollout"].get("async_rollout"):
        return None
    busy = statistics.fmean(of.busy_shares)
    if busy > 0.4:
        return None
    return (
        f"in a rollout the engines hold {busy:.0%} of the sequences that they can, on average: "
        "--over-sampling-batch-size with --partial-rollout leaves its tail to the next one",
        "the longest response of a rollout keeps all GPUs, however short the others are",
    )


def _host_memory(of: Stretch) -> Found | None:
    memory = of.conditions
    if memory is None or not memory.host_memory or memory.host_memory_used < 0.92 * memory.host_memory:
        return None
    return (
        f"{memory.host_memory_used / 1e9:.0f} of {memory.host_memory / 1e9:.0f} GB of host memory are in use: leave "
        "out --async-save, or end what else runs on this machine",
        "where none is left, the kernel kills a process of the run",
    )


def _behind_plan(of: Stretch) -> Found | None:
    seconds = [
        whole - (line.get("seconds_eval") or 0.0) - (line.get("seconds_save") or 0.0)
        for line in of.last
        if (whole := line.get("seconds_step")) is not None
    ]
    if of.planned_step_s is None or len(seconds) < WINDOW:
        return None
    typical = statistics.median(seconds)
    if typical < max(1.25 * of.planned_step_s, of.planned_step_s + UNPLANNED_S):
        return None
    return (
        f"a step takes {typical:.0f} s, and at most {of.planned_step_s:.0f} were planned: `make smoke` tells whether "
        'the node is good, `make plan ARGS="--lengths-of RUN"` what these lengths should take',
        "a slow node or link costs as much as a good one",
    )


def _grader(of: Stretch) -> Found | None:
    failed, samples = of.mean("grader_failed"), of.mean("samples")
    if failed is None or samples is None or failed < 0.01 * samples:
        return None
    return (
        f"the grader fails for {failed / samples:.1%} of the samples: look at samples whose grade is grader_failed, "
        "and raise --rm-timeout-s if it ran out of time",
        "a sample that is not graded counts as wrong",
    )


def _restarts(of: Stretch) -> Found | None:
    restarts = of.mean("engine_restarts")
    if restarts is None or restarts * WINDOW < 2:
        return None
    return (
        f"engines were started again {restarts * WINDOW:.0f} times in {WINDOW} steps: look at logs/ of the run; lower "
        "--sglang-mem-fraction-static if they ran out of memory",
        "each start costs a minute and more",
    )


def _skipped(of: Stretch) -> Found | None:
    skipped = [line["skipped_steps"] for line in of.last if line.get("skipped_steps") is not None]
    if len(skipped) < 2 or (skipped[-1] or 0) <= (skipped[0] or 0):
        return None
    return (
        "gradients were not finite, and steps were left out: lower --lr or --clip-grad, or go back to an earlier "
        "checkpoint",
        "a run that diverges does not come back",
    )


def _clipped(of: Stretch) -> Found | None:
    share = of.mean("clip_share")
    if share is None or share < 0.2:
        return None
    return (
        f"PPO clips {share:.0%} of the tokens: lower --lr, or take fewer optimizer steps a rollout (a larger "
        "--global-batch-size)",
        "tokens that are clipped teach nothing: the policy has moved further than a rollout can tell",
    )


def _worse(of: Stretch) -> Found | None:
    for name, was in of.before.items():
        high, low = of.evaluated.get(f"{name}_ci95_high"), of.before.get(f"{name}_ci95_low")
        if name.startswith("eval/") and high is not None and low is not None and high < low:
            now = of.evaluated[name]
            return (
                f"{name.removeprefix('eval/')} has fallen from {was:.3f} to {now:.3f}: go back to an earlier "
                "checkpoint with a lower --lr, or --use-kl-loss",
                "the 95% intervals of before and now do not meet, so this is no chance",
            )
    return None


RULES: dict[str, tuple[Callable[[Stretch], Found | None], str]] = {
    "truncated": (_truncated, "docs/troubleshooting.md#responses-grow-until-they-are-cut-off"),
    "nothing-to-learn": (_nothing_to_learn, "docs/troubleshooting.md#the-loss-is-0-and-nothing-is-learned"),
    "entropy": (_entropy, "docs/troubleshooting.md#entropy-falls-to-0-and-the-reward-stops-rising"),
    "difference": (_difference, "docs/objectives.md#the-bill-of-a-mismatch"),
    "idle-engines": (_idle_engines, "docs/troubleshooting.md#a-step-takes-many-minutes-and-most-of-it-is-the-rollout"),
    "host-memory": (_host_memory, "docs/troubleshooting.md#memory-and-disk"),
    "behind-plan": (_behind_plan, "docs/plan.md#time-and-money-are-ranges"),
    "grader": (_grader, "docs/troubleshooting.md#the-reward-stays-at-0"),
    "restarts": (_restarts, "docs/troubleshooting.md#an-engine-is-started-again-at-every-rollout"),
    "skipped": (_skipped, "docs/troubleshooting.md#learning"),
    "clipped": (_clipped, "docs/objectives.md#objectives"),
    "worse": (_worse, "docs/evaluation.md#in-training"),
}
"""Each rule by its name, with the page that says more."""


class Adviser:
    """Takes the steps of a run one after the other."""

    def __init__(self, config: Mapping[str, Any], planned_step_s: float | None) -> None:
        """`config` as `recipe.run.manifest.public_config` gives it."""
        self._config, self._planned = config, planned_step_s
        self._first: list[Values] = []
        self._last: deque[Values] = deque(maxlen=WINDOW)
        self._before: Values = {}
        self._evaluated: Values = {}
        self._least: float | None = None
        self._conditions: Conditions | None = None
        self._busy: deque[float] = deque(maxlen=WINDOW)
        self._told: set[str] = set()
        self.standing: dict[str, Advice] = {}
        """What holds after the newest step, by rule."""

    def take(self, line: Values, conditions: Conditions | None) -> list[Advice]:
        """A step is done. Returns the advice of rules that have said nothing before in this run."""
        if any(name.startswith("eval/") for name in line):
            self._evaluated = line
        if not line["step"]:
            self._before = line
            return []
        self._first = self._first if len(self._first) == WINDOW else [*self._first, line]
        self._last.append(line)
        if conditions is not None:
            self._conditions = conditions
            if conditions.busy_share is not None:
                self._busy.append(conditions.busy_share)
        found = {advice.rule: advice for advice in self._found(int(line["step"] or 0))}
        new = [advice for rule, advice in found.items() if rule not in self._told]
        self._told |= found.keys()
        self.standing = {rule: self.standing.get(rule, advice) for rule, advice in found.items()}
        return new

    def _found(self, step: int) -> Iterator[Advice]:
        stretch = Stretch(
            tuple(self._first),
            tuple(self._last),
            self._least,
            self._before,
            self._evaluated,
            self._conditions,
            tuple(self._busy),
            self._config,
            self._planned,
        )
        for rule, (check, page) in RULES.items():
            if (found := check(stretch)) is not None:
                yield Advice(rule, step, *found, page)
        if (difference := stretch.mean("logprob_diff_mean")) is not None:
            self._least = difference if self._least is None else min(self._least, difference)
