"""The loop of recipe.train with a trainer and engines of this process: whole runs in milliseconds, which may be struck
at any moment.

The weights are a number that each optimizer step changes by all that it learns from, and tokens depend on it: two runs
that end with the same weights have learned the same from the same samples in the same order.
"""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import pytest

from recipe import train as loop
from recipe.assembly import RolloutEngines, Run
from recipe.assembly.inputs import Data
from recipe.config import Config
from recipe.data.prompts import Prompt
from recipe.data.source import PromptSource
from recipe.generation.custom_generate import Generation
from recipe.messages import Evaluated, Progress, Scores, StepReport, TrainSample
from recipe.rollout.client import ClientCounters
from recipe.rollout.filters import GroupFilter
from recipe.run.conditions import Course
from recipe.run.metrics import StepMetrics
from recipe.sampling.sample import FinishReason, SampleGroup
from recipe.system.errors import UserError
from recipe.system.seeds import derive
from recipe.system.shutdown import SAVED_STATUS

PROMPTS = [Prompt(number, (), "", (number + 1, 2), "0") for number in range(1000)]


class Killed(BaseException):
    """As if the process were gone: what was saved before is all that is left."""


class Failed(UserError):
    """What a part of the run tells of its failure."""


@dataclass
class Strike:
    """Something happens to the run at its `at`-th point; 0: never."""

    at: int = 0
    how: Callable[[], None] = lambda: None
    points: list[str] = field(default_factory=list)

    def point(self, name: str) -> None:
        self.points.append(name)
        if len(self.points) == self.at:
            self.how()


def kill() -> None:
    raise Killed


def fail() -> None:
    raise Failed


def notice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Trainer:
    """The ranks, and the disk that checkpoints are on."""

    strike: Strike
    weights: int = 1
    trained: list[int] = field(default_factory=list)
    """The samples that these weights have learned from."""
    checkpoint: str = ""
    in_training: Callable[[list[str]], None] = lambda _: None
    """What an optimizer step waits for, of the points so far."""
    is_well: bool = True

    def _point(self, name: str) -> None:
        try:
            self.strike.point(name)
        except Failed:
            self.is_well = False
            raise

    def log_probs(self, samples: Sequence[TrainSample], *, of_reference: bool = False) -> Scores:
        return Scores({sample.index: np.zeros(sample.response_length, np.float32) for sample in samples})

    def train_step(self, samples: Sequence[TrainSample]) -> StepReport:
        self._point("train")
        self.in_training(self.strike.points)
        for sample in samples:
            assert sample.advantages is not None
            told = (*sample.tokens.tolist(), *sample.advantages.tolist())
            self.weights = derive(self.weights, sample.index, *map(repr, told))
            self.trained.append(sample.index)
        self._point("trained")
        return StepReport({"loss": float(self.weights % 97)}, skipped=False)

    def save(self, _: Path, progress: Progress, *, beside_others: bool = False) -> None:
        self._point("save beside all others" if beside_others else "save")
        self.checkpoint = json.dumps([asdict(progress), self.weights, self.trained])
        self._point("saved")

    def load(self) -> Progress:
        content, self.weights, self.trained = json.loads(self.checkpoint)
        return Progress(**content)

    def host_memory(self) -> list[dict[str, int]]:
        return []

    def finish_save(self) -> None: ...

    def make_room(self) -> None: ...

    def load_compiler(self) -> None: ...


class Engines:
    """The client and all that is behind it; who finishes first is a matter of luck."""

    def __init__(self, strike: Strike, luck: int, *, in_flight: bool) -> None:
        self.strike, self.in_flight = strike, in_flight
        self.luck = random.Random(luck)
        self.version, self.weights = "", 0
        self.under_way, self.draining = 0, False
        self.course, self.counters, self.last_failure = Course(), ClientCounters(), ""
        self.weight_bytes_per_second = self.seconds_paused = None

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.TaskGroup]:
        self.draining = False
        try:
            async with asyncio.TaskGroup() as tasks:
                yield tasks
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def generate(self, group: SampleGroup, sampling: Any, seeds: Sequence[int], *, routed: bool) -> None:
        if group.is_finished:
            return
        self.under_way += 1
        self.course.change(1)
        self.strike.point("generate")
        try:
            for _ in range(group.samples[0].response_length, 3):  # tokens, between which weights may change in flight
                for _ in range(self.luck.randrange(3)):
                    await asyncio.sleep(self.luck.choice([0, 0.0005]))
                if self.draining:
                    return
                for sample, seed in zip(group.samples, seeds, strict=True):
                    token = derive(seed, self.weights, sample.response_length) % 100
                    sample.append_model([token], [-0.5], [self.version])
        finally:
            self.under_way -= 1
            self.course.change(-1)
        for sample in group.samples:
            sample.finish_reason = FinishReason.STOP
            sample.reward = float(sample.response_ids[-1] % 3)
        self.strike.point("generated")

    async def drain(self) -> None:
        self.draining = True

    def move(self, urls: Sequence[str]) -> None: ...

    def release_memory(self) -> None:
        self.strike.point("release")

    def begin_end(self) -> None: ...

    @asynccontextmanager
    async def changing(self, _: int) -> AsyncIterator[None]:
        self.strike.point("changing")
        await asyncio.sleep(0)  # as if weights were still sent to an engine that was started again
        yield

    @asynccontextmanager
    async def updating(self, _: str) -> AsyncIterator[None]:
        self.strike.point("updating")
        yield

    def update_weights(self, trainer: Trainer, version: int) -> list[str]:
        self.strike.point("update")
        assert self.in_flight or not self.under_way, "weights change under a request"
        self.version, self.weights = str(version), trainer.weights
        self.strike.point("updated")
        return []


@dataclass
class Scored:
    """Scores one version on engines that nobody else uses, unless they take weights in flight."""

    engines: Engines
    versions: list[str] = field(default_factory=list)

    async def evaluate(self, *parts: Any, expected_version: str) -> dict[str, Evaluated]:
        self.engines.strike.point("evaluate")
        for _ in range(5):
            await asyncio.sleep(0)
            assert self.engines.version == expected_version
            assert self.engines.in_flight or not self.engines.under_way
        self.versions.append(expected_version)
        return {}


@dataclass
class Outcome:
    """What a run, struck or not, has left."""

    trainer: Trainer
    lines: dict[int, dict[str, Any]]
    """Of metrics.jsonl without times, by step, those of a step that was done again replaced."""
    points: list[str]
    evaluated: list[str]
    unused: list[int]
    """The draws that were made and that the run will make again."""
    drawn: int
    commands: int
    """It took."""


def run(
    *flags: str,
    strike: Strike | None = None,
    luck: int = 0,
    keep: GroupFilter | None = None,
    then: Sequence[str] | None = None,
    in_training: Callable[[list[str]], None] = lambda _: None,
) -> Outcome:
    """Runs to the end, and goes on from the last checkpoint where it was struck, with other luck and flags `then`."""
    strike = strike or Strike()
    trainer = Trainer(strike, in_training=in_training)
    lines: dict[int, dict[str, Any]] = {}
    points: list[str] = []
    for commands in count(1):
        ended, outcome = _command(config_of(*flags), trainer, strike, luck, lines, keep)
        points += strike.points
        if ended:
            return Outcome(trainer, lines, points, *outcome, commands)
        strike, luck, flags = Strike(), luck + 1, flags if then is None else tuple(then)
        disk = trainer.checkpoint
        trainer = Trainer(strike, checkpoint=disk)
    raise AssertionError


def _command(
    config: Config, trainer: Trainer, strike: Strike, luck: int, lines: dict[int, Any], keep: GroupFilter | None
) -> tuple[bool, tuple[list[str], list[int], int]]:
    """One command: whether it came to its end."""
    source = PromptSource(PROMPTS, shuffle=True, seed=3)
    engines = Engines(strike, luck, in_flight=config.rollout.update_weight_in_flight is not None)
    scored = Scored(engines)
    data = Data(source, cast(Any, scored), None, keep, Generation(), cast(Any, None))
    directory, recorded = MagicMock(), set()

    def record(metrics: StepMetrics) -> None:
        assert metrics.step not in recorded, "a step is written down twice"
        recorded.add(metrics.step)
        timed = ("seconds_", "_per_second")
        lines[metrics.step] = {k: v for k, v in metrics.as_line().items() if not any(word in k for word in timed)}
        strike.point("recorded")

    directory.record.side_effect = record

    @asynccontextmanager
    async def open_run(*_: Any) -> AsyncIterator[Run]:
        progress = trainer.load() if trainer.checkpoint else Progress()
        parts = RolloutEngines(cast(Any, engines), cast(Any, engines), None, data, config, progress.rollouts)
        run = Run(
            cast(Any, SimpleNamespace(config=config)),
            data,
            cast(Any, trainer),
            parts,
            directory,
            MagicMock(),
            MagicMock(),
            progress,
            MagicMock(),
        )
        if parts.ahead is None:
            yield run
            return
        async with parts.ahead:
            yield run
        assert not engines.under_way, "something is left running"

    async def command() -> None:
        await loop.train(cast(Any, SimpleNamespace(config=config)), None)
        assert len(asyncio.all_tasks()) == 1, "something is left running"

    with pytest.MonkeyPatch.context() as patch, suppress(Killed, Failed):
        patch.setattr(loop, "open_run", open_run)
        try:
            asyncio.run(command())
        except SystemExit as ending:
            if ending.code != SAVED_STATUS:
                raise
            return False, ([], [], 0)
        state, [progress, *_] = source.state_dict(), json.loads(trainer.checkpoint)
        unused = [*state["put_back"], *(group["index"] for group in progress["waiting"])]
        return True, (scored.versions, unused, state["drawn"])
    return False, ([], [], 0)


def config_of(*flags: str) -> Config:
    """Of six rollouts of two groups of two samples. `flags` are names of fields of the rollout with their values."""
    settings = {
        "model": {"hf_checkpoint": "hf"},
        "data": {"prompt_data": "prompts"},
        "rollout": {
            "num_rollout": 6,
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 4,
            **dict(flag.split("=") for flag in flags),
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"save_interval": 2},
        "eval": {"eval_interval": 2},
        "misc": {"keep_token_groups": 0},
    }
    return Config.model_validate(settings)
