"""The steps of a smoke run, in order; each adds what it measured."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Event, Thread

from recipe.data.arithmetic_task import write_task
from recipe.plan.machine import FoundMachine, read_gpus
from recipe.plan.node import Rates
from recipe.plan.preflight import findings_on
from recipe.smoke.measured import Interruption, Measured, Memory, goes_on, learning_of, read_lines
from recipe.smoke.process import Ended, carry_out
from recipe.smoke.projection import planned_memory, project, read_recipe
from recipe.smoke.settings import Settings, train_command
from recipe.system.shutdown import SAVED_STATUS
from recipe.weights.tiny import KERNEL_SIZES, write_tiny_checkpoint

MAX_OPERAND, HELD_OUT_SUMS = 9, 200
"""The arithmetic task's: 1,000 sums, of which these are held out."""
MEMORY_EVERY_S = 0.5


@dataclass
class GrpoWatch:
    """Looks at GRPO while it runs: when the first line of metrics comes, and when it is time for the SIGTERM."""

    settings: Settings
    began: float = field(default_factory=time.monotonic)
    first_line_s: float | None = None
    struck_at: float | None = None
    _size: int = 0

    def __call__(self, process: subprocess.Popen[str]) -> None:
        path = self.settings.grpo / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._size or self.struck_at is not None:
            return
        self._size = size
        lines = read_lines(self.settings.grpo)
        if lines and self.first_line_s is None:
            self.first_line_s = time.monotonic() - self.began
        if lines and lines[-1]["step"] >= self.settings.interrupt_after:
            self.struck_at = time.monotonic()
            process.send_signal(signal.SIGTERM)


class SmokeRun:
    """A smoke run under way."""

    def __init__(self, settings: Settings, machine: FoundMachine, price: float) -> None:
        self._settings, self._price = settings, price
        kind = min(machine.gpus, key=lambda gpu: gpu.memory).described() if settings.gpus else None
        self.measured = Measured(machine=machine, gpus=settings.gpus, kind=kind, findings=())
        self._seconds: dict[str, float] = {}

    def carry_out(self) -> Measured:
        """All steps, or those up to the first that fails."""
        self._make_model()
        if self._look_at_machine() and self._measure_rates() and self._warm_up():
            self._learn()
        return replace(self.measured, seconds=self._seconds)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] = time.monotonic() - began

    def _add(self, **found: object) -> None:
        self.measured = replace(self.measured, **found)  # type: ignore[arg-type]

    def _fail(self, step: str, ended: Ended) -> None:
        sentence = f"{step} ended with status {ended.status}: {ended.last_words}"
        self._add(failures=(*self.measured.failures, sentence))

    def _make_model(self) -> None:
        with self._timed("model"):
            settings = self._settings
            # The larger model learns sums by heart before it learns to add: it is asked for other orders of them.
            together = not settings.gpus
            write_task(settings.task, settings.seed, MAX_OPERAND, HELD_OUT_SUMS, keep_orders_together=together)
            write_tiny_checkpoint(settings.untrained, settings.seed, KERNEL_SIZES if settings.gpus else None)

    def _look_at_machine(self) -> bool:
        """What the machine lacks, and whether the loop can run on it all the same."""
        flags = [*self._settings.grpo_flags(), "--hf-checkpoint", str(self._settings.untrained)]
        machine = self.measured.machine
        if self._settings.gpus == 1:
            machine = replace(machine, linked=True)  # one GPU needs no links
        findings = list(findings_on(read_recipe(flags), machine))
        self._add(findings=tuple(finding.sentence for finding in findings))
        return not any(finding.stops for finding in findings)

    def _measure_rates(self) -> bool:
        gpus, directory = self._settings.gpus, self._settings.directory
        output = directory / "rates.json"
        command = [sys.executable, "-m", "recipe.smoke.rates", "--num-gpus", str(gpus), "--output", str(output)]
        with self._timed("rates"):
            ended = carry_out("rates of this machine", command, lambda _: None, directory / "rates.log")
        if ended.status:
            self._fail("measuring rates", ended)
            return False
        rates = Rates(**json.loads(output.read_text()))
        self._add(rates=rates)
        if self.measured.kind is not None:
            self._add(projection=project(self.measured.machine, gpus, self.measured.kind, rates, self._price))
        return True

    def _warm_up(self) -> bool:
        command = train_command(self._settings.warm_up_flags())
        with self._timed("warm-up"):
            ended = carry_out("supervised warm-up", command, lambda _: None, self._settings.directory / "sft.log")
        if ended.status:
            self._fail("the warm-up", ended)
        return ended.status == 0

    def _learn(self) -> None:
        """GRPO, interrupted and resumed."""
        with self._watching_memory():
            self._learn_until_interrupted()
            if self.measured.interruption is not None and self.measured.interruption.status == SAVED_STATUS:
                self._resume(self.measured.interruption)
        self._add(learning=learning_of(read_lines(self._settings.grpo)))

    def _learn_until_interrupted(self) -> None:
        watch, log = GrpoWatch(self._settings), self._settings.directory / "grpo.log"
        with self._timed("GRPO"):
            ended = carry_out("GRPO", train_command(self._settings.grpo_flags()), watch, log)
        ended_at, lines = time.monotonic(), read_lines(self._settings.grpo)
        if watch.first_line_s is not None:
            # The first line is the evaluation before the first step, written when that is over.
            evaluating = lines[0].get("seconds_eval", 0.0)
            self._add(first_token_s=watch.first_line_s - evaluating)
        if watch.struck_at is None:
            self._fail("GRPO, before it was interrupted,", ended)
            return
        step = lines[-1]["step"]
        self._add(interruption=Interruption(ended.status, step, ended_at - watch.struck_at, ended.last_words))

    def _resume(self, interruption: Interruption) -> None:
        settings, before = self._settings, read_lines(self._settings.grpo)
        flags = [*settings.grpo_flags(), "--load", str(settings.checkpoints)]
        with self._timed("resumed"):
            ended = carry_out("GRPO, resumed", train_command(flags), lambda _: None, settings.directory / "grpo.log")
        whole = goes_on(before, read_lines(settings.grpo), read_recipe(flags).config.rollout.num_rollout)
        told = replace(interruption, resumed_status=ended.status, goes_on=whole, last_words=ended.last_words)
        self._add(interruption=told)

    @contextmanager
    def _watching_memory(self) -> Iterator[None]:
        """Takes down the most memory of the fullest GPU in the block, beside what the plan says."""
        if not self._settings.gpus:
            yield
            return
        over, most = Event(), [0]

        def look() -> None:
            while not over.wait(MEMORY_EVERY_S):
                most[0] = max([most[0], *(gpu.used for gpu in read_gpus())])

        thread = Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        planned, phase = planned_memory(self._settings.grpo_flags(), self.measured.machine)
        self._add(memory=Memory(planned=planned, phase=phase, measured=most[0]))
