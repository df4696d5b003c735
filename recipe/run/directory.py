"""The run directory runs/NAME/: everything a run leaves behind.

    manifest.json    configuration and its sources, seed, versions, git commit, hashes of checkpoint and data
    metrics.jsonl    a line a step
    rollouts/        a file a rollout, a line a sample
    samples.jsonl    the numbers of all samples, a line a rollout
    tokens/          some samples of each rollout token by token
    evals.jsonl      the score of every problem of an evaluation set, a line a set and evaluation
    conditions.jsonl of each step: when sequences were under way, host memory
    status.json      what the run is doing, every few seconds
    plan.json        what `make plan` said of it on this machine
    checkpoints/     written by the trainer
    tensorboard/     the metrics as TensorBoard events
    summary.json     how the run ended, rewards before and after, where the time of its start and of its steps went;
                     written when the run ends, however it ends
    reward.png       the same as a picture
    host_memory.json the most host memory that the training ranks used, by machine and part, in bytes
    kept_steps/      tokens of the newest steps that begin at a checkpoint, for `make mismatch`
    exports.json     what `--save-hf` wrote
    wandb_id         the run's id at Weights & Biases (--use-wandb)
    hung-ranks.txt   what every training rank was doing when one had hung, if one did

A run is continued by --load with its own checkpoints. What it wrote after the loaded checkpoint is cut off then, so
that its files become those of a run that was never interrupted.
"""

import json
import shutil
import time
from asyncio import CancelledError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from recipe.config import Resolved
from recipe.messages import Evaluated
from recipe.run import comparison, conditions, planned, sample_index, shown_tokens
from recipe.run.advice import Adviser
from recipe.run.comparison import evaluation_line
from recipe.run.conditions import Conditions
from recipe.run.journal import Journal, encode, writing
from recipe.run.kept_steps import FOLDER, KeptStep, path_of, steps_in, write_step
from recipe.run.manifest import public_config, write_manifest
from recipe.run.metrics import StepMetrics
from recipe.run.outputs import Exports, check_outputs
from recipe.run.planned import Planned
from recipe.run.sample_index import index_line
from recipe.run.shown_tokens import ShownTokens, write_tokens
from recipe.run.status import RunState, StatusWriter
from recipe.run.summary import summarize
from recipe.system.errors import UserError
from recipe.system.files import FileLock, atomic_write_bytes, atomic_write_text
from recipe.system.shutdown import Stopped

if TYPE_CHECKING:
    from recipe.run.sinks import MetricSink


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """A sample as it is kept in rollouts/."""

    index: int
    """Unique in the run."""
    group_index: int
    prompt_index: int
    """Line of the prompt in its file."""
    prompt: str
    response: str
    label: str
    prompt_length: int
    """In tokens."""
    response_length: int
    """Tokens that the model generated."""
    environment_length: int = 0
    """Tokens between them that it only read: of tools and templates."""
    finish_reason: str
    weight_versions: Sequence[int]
    """The versions that generated its tokens, in order, without repetitions."""
    mean_log_prob: float | None
    """Mean log-probability of the generated tokens, at generation, in nats; None where there are none."""
    reward: float
    advantage: float
    grade: str
    """The grader's status."""
    answer: str | None
    """What the grader took for the answer."""
    source: str = ""
    """Name of the prompt's file, where the run has several."""


class RunDirectory:
    """Use as a context manager: leaving it, for whatever reason, writes summary.json and reward.png."""

    def __init__(self, resolved: Resolved) -> None:
        """Creates the directory or opens it to go on. Raises UserError if it holds a run that is not to be continued,
        or cannot be written."""
        self._config = resolved.config
        self.path = resolved.config.run_dir
        self._metrics = Journal(self.path / "metrics.jsonl")
        self._rollouts = self.path / "rollouts"
        self._sinks: list[MetricSink] = []
        self._conditions = Journal(self.path / conditions.FILE)
        self._evals = Journal(self.path / comparison.FILE)
        self._index = Journal(self.path / sample_index.FILE)
        self._host_memory: list[dict[str, int]] = []
        self._start: Mapping[str, float] = {}
        check_outputs(self._config)
        with writing(self.path):
            self._rollouts.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock", f"a run is at work in {self.path}: choose another --name")
        if self._metrics.read():
            self._refuse_unless_continued()
        with writing(self.path):
            write_manifest(self.path / "manifest.json", resolved)
        self._open_sinks()  # before anything else starts: they may want a key or a port, and outlive Ray
        config = self._config
        least_s = sum(line["seconds_step"] or 0.0 for line in self._metrics.read())
        self.status = StatusWriter(self.path, config.rollout.num_rollout, config.paid_for, config.misc.price, least_s)

    def _open_sinks(self) -> None:
        """Raises UserError for one that cannot be had."""
        misc = self._config.misc
        if misc.use_wandb:
            from recipe.run.sinks import WandbSink

            self._sinks.append(WandbSink(misc, public_config(self._config), self.path / "wandb_id"))
        if misc.metrics_port is not None:
            from recipe.run.sinks import PrometheusSink

            self._sinks.append(PrometheusSink(misc.name, misc.metrics_port))

    def _refuse_unless_continued(self) -> None:
        """A directory that holds steps is only opened to go on from its own checkpoints; without one it begins anew."""
        load, own = self._config.checkpoint.load, self._config.save_dir
        if load is None or not load.resolve().is_relative_to(own.resolve()):
            raise UserError(f"{self.path} holds a run already: go on with it by --load {own}, or choose another --name")

    def start(self, steps_done: int) -> None:
        """Begins to record, after the checkpoint that holds `steps_done` steps was loaded (0: from the beginning).
        Removes what a run wrote after it; TensorBoard's events are made anew from the lines that stay."""
        # Its packages, and matplotlib's, take a second to import, for which Ray need not wait.
        from recipe.run.sinks import PrometheusSink, TensorBoardSink

        events = self.path / "tensorboard"
        self._metrics.keep(lambda line: 0 < steps_done >= line["step"])
        self._conditions.keep(lambda line: 0 < steps_done >= line["step"])
        self._evals.keep(lambda line: 0 < steps_done >= line["step"])
        self._index.keep(lambda line: steps_done > line["rollout_id"])
        self.status.count(steps_done)
        with writing(self.path):
            for file in (self.path / shown_tokens.FOLDER).glob("*.jsonl"):
                if int(file.stem) >= steps_done:
                    file.unlink()
            for file in self._rollouts.glob("*.jsonl"):
                if int(file.stem) >= steps_done:
                    file.unlink()
            for step in steps_in(self.path):
                if step > steps_done:
                    path_of(self.path, step).unlink()
            if events.exists():
                shutil.rmtree(events)
            tensorboard = TensorBoardSink(events)
            lines = self._metrics.read()
            for line in lines:
                tensorboard.log(line)
            for sink in self._sinks:
                if isinstance(sink, PrometheusSink) and lines:
                    sink.log(lines[-1])
        self._sinks.append(tensorboard)

    def record_start(self, seconds: Mapping[str, float]) -> None:
        """What the start took; `seconds` may still grow."""
        self._start = seconds

    def record(self, metrics: StepMetrics) -> None:
        """Adds a step to metrics.jsonl, on the disk when this returns. To be called before the step's checkpoint is
        saved: a run that goes on from it then has the line. Raises UserError if the disk is full; a checkpoint that is
        saved because of that has a step without a line."""
        line = metrics.as_line()
        self._metrics.append(line)
        self.status.count(metrics.step)
        with writing(self.path):
            for sink in self._sinks:
                sink.log(line)

    def record_rollout(
        self, rollout_id: int, samples: Sequence[SampleRecord], shown: Sequence[ShownTokens] = ()
    ) -> None:
        """Writes rollouts/ROLLOUT_ID.jsonl, whole or not at all, its line of samples.jsonl, and the tokens of the
        samples that are `shown`. Raises UserError if the disk is full."""
        path = self._rollouts / f"{rollout_id:06}.jsonl"
        with writing(path):
            atomic_write_bytes(path, b"".join(encode(vars(sample)) for sample in samples))
            if shown:
                write_tokens(self.path, rollout_id, shown)
        self._index.append(index_line(rollout_id, samples))

    def record_evaluation(self, step: int, evals: Mapping[str, Evaluated]) -> None:
        """Adds a line to evals.jsonl for each set, before the step is recorded. Raises UserError for a full disk."""
        for name, found in evals.items():
            self._evals.append(evaluation_line(step, name, found))

    def record_conditions(self, of_step: Conditions) -> None:
        """Adds a line to conditions.jsonl. Raises UserError if the disk is full."""
        self._conditions.append(of_step.as_line())

    def record_plan(self, plan: str) -> None:
        """Writes plan.json. Raises UserError if the disk is full."""
        with writing(self.path):
            atomic_write_text(self.path / planned.FILE, plan + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Those of metrics.jsonl."""
        return self._metrics.read()

    def adviser(self) -> Adviser:
        """With the steps that this directory holds."""
        step_s = Planned.read(self.path).step_s
        adviser = Adviser(public_config(self._config), None if step_s is None else step_s[1])
        of_step = {line["step"]: Conditions.from_line(line) for line in self._conditions.read()}
        for line in self._metrics.read():
            adviser.take(line, of_step.get(line["step"]))
        return adviser

    def keep_step(self, step: int, kept: KeptStep) -> None:
        """Keeps what a step learned from, if steps are to be kept. Raises UserError if the disk is full."""
        if newest := self._config.misc.keep_steps_for_mismatch:
            with writing(self.path / FOLDER):
                write_step(self.path, step, kept, newest)

    def record_host_memory(self, machines: Sequence[Mapping[str, int]]) -> None:
        """Takes down what the training ranks of each machine use now. The file keeps the most that was ever seen."""
        self._host_memory = self._host_memory or [{} for _ in machines]
        for most, now in zip(self._host_memory, machines, strict=True):
            most |= {part: max(used, most.get(part, 0)) for part, used in now.items()}
        lines = [{**most, "total": sum(most.values())} for most in self._host_memory]
        with writing(self.path):
            atomic_write_text(self.path / "host_memory.json", json.dumps(lines, indent=1) + "\n")

    def claim_export(self, target: Path) -> None:
        """To be called before `--save-hf` writes there. Raises UserError if this run did not write what lies there."""
        Exports(self.path).claim(target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._lock:
            state, how = _ending(error)
            try:
                if error is None:
                    self._close("finished")
                    return
                with suppress(UserError, OSError):
                    self._close(f"failed: {how}" if state is RunState.FAILED else state)
            finally:
                self.status.close(state, how)

    def _close(self, outcome: str) -> None:
        from recipe.run.plots import draw_rewards

        lines = self._metrics.read()
        evals = [data.name for data in self._config.eval.eval_prompt_data]
        summary = summarize(lines, evals, outcome, time.time() - psutil.Process().create_time(), self._start)
        with writing(self.path):
            atomic_write_text(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")
            atomic_write_bytes(self.path / "reward.png", draw_rewards(self.path.name, lines, evals))
            for sink in self._sinks:
                sink.close()


def _ending(error: BaseException | None) -> tuple[RunState, str]:
    """What a run is that ended so, and how that is told."""
    match error:
        case None:
            return RunState.FINISHED, "all rollouts are done"
        case Stopped():
            return RunState.STOPPED, error.why
        case KeyboardInterrupt() | CancelledError() | SystemExit():
            return RunState.INTERRUPTED, "by a signal"
        case UserError():
            return RunState.FAILED, str(error)
        case _:
            return RunState.FAILED, repr(error)
