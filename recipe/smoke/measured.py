"""What a smoke run measured: from its own clock, and from the run directory of GRPO."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.plan.hardware import Gpu
from recipe.plan.machine import FoundMachine
from recipe.plan.node import Rates
from recipe.plan.ranges import Between

HELD_OUT = "eval/heldout"
SETTLED = 3
"""The first steps compile kernels: figures of a usual step leave them out."""


@dataclass(frozen=True)
class Learning:
    """What GRPO came to."""

    steps: int
    before: float
    """Held-out share of right answers."""
    after: float | None
    """None: it was not scored again."""
    step_s: float
    update_s: float
    """Median seconds of a step, and of its weight update."""
    logprob_diff_mean: float
    """Mean over the steps of the mean |log-prob of the trainer - of the engine|, in nats a token."""
    logprob_kl: float
    """Mean k3 estimate of KL(engine || trainer) over the steps."""
    accept_length: float | None
    """Tokens that a verification brings a sequence, over the last quarter of the steps; None without drafts."""
    first_accept_length: float | None
    """Mean acceptance length over the first quarter of the steps."""


@dataclass(frozen=True)
class Interruption:
    """The SIGTERM in the middle of GRPO, and how it went on."""

    status: int
    """Exit status of the interrupted run."""
    step: int
    """The last one that it recorded."""
    save_s: float
    """From the signal to the end."""
    last_words: str
    """What the run that ended last said at its end."""
    resumed_status: int | None = None
    """Exit status of the run that went on; None: there was none."""
    goes_on: bool = False
    """Whether that kept every step before and repeated and left out none after."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU, planned and measured."""

    planned: int
    phase: str
    """In which the plan has that much."""
    measured: int
    """The most that nvidia-smi told while GRPO ran."""


@dataclass(frozen=True)
class Projection:
    """A step of the 8-GPU recipe on a node like this one, with the rates that were measured."""

    recipe: str
    seconds: Between
    phases: Mapping[str, Between]
    dollars: Between
    price: float
    """Dollars a GPU and hour."""
    problems: tuple[str, ...]
    """Why the recipe does not fit this node; empty where the node has fewer GPUs than it needs."""


@dataclass(frozen=True)
class Measured:
    """Everything; None where it did not come to it, or a CPU cannot."""

    machine: FoundMachine
    gpus: int
    """Used; 0: on the CPU."""
    kind: Gpu | None
    """What the data sheet says of the GPUs."""
    findings: tuple[str, ...]
    """What is wrong with the machine before anything runs."""
    rates: Rates | None = None
    failures: tuple[str, ...] = ()
    """Steps that ended as they should not, a sentence each."""
    learning: Learning | None = None
    interruption: Interruption | None = None
    memory: Memory | None = None
    first_token_s: float | None = None
    """From GRPO's command to the first token."""
    projection: Projection | None = None
    seconds: Mapping[str, float] | None = None
    """Seconds of each part of the smoke run."""


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def learning_of(lines: Sequence[Mapping[str, Any]]) -> Learning | None:
    """From all lines of GRPO; None if no step was made."""
    steps = [line for line in lines if line["step"] > 0]
    scores = [line[HELD_OUT] for line in lines if HELD_OUT in line]
    if not steps or not scores:
        return None
    usual = steps[SETTLED:] or steps
    accepted = [line["draft_accept_length"] for line in steps if "draft_accept_length" in line]
    quarter = max(1, len(accepted) // 4)
    return Learning(
        steps=len(steps),
        before=scores[0],
        after=scores[-1] if len(scores) > 1 else None,
        step_s=statistics.median(line["samples"] / line["samples_per_second"] for line in usual),
        update_s=statistics.median(line["seconds_update_weights"] for line in usual),
        logprob_diff_mean=statistics.fmean(line["logprob_diff_mean"] for line in steps),
        logprob_kl=statistics.fmean(line["logprob_kl"] for line in steps),
        accept_length=statistics.fmean(accepted[-quarter:]) if accepted else None,
        first_accept_length=statistics.fmean(accepted[:quarter]) if accepted else None,
    )


def goes_on(before: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], last: int) -> bool:
    """Whether the lines of a resumed run begin with all those `before` it and then count up to step `last`."""
    return list(lines[: len(before)]) == list(before) and [line["step"] for line in lines] == list(range(last + 1))
