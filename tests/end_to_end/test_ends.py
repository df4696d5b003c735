"""Ctrl-C and SIGTERM end a run soon at every stage, also where something hangs; nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from run_support import (
    ONE_RANK,
    TinyInputs,
    arguments,
    engines,
    family,
    finish,
    leaves_nothing,
    start,
    wait_for_step,
    wait_until,
    words_of,
)

from recipe.system.shutdown import SAVED_STATUS
from recipe.weights.checkpoints import latest

pytestmark = pytest.mark.slow

ENDS_WITHIN_S = 60.0
"""Four times what is promised: tests share their cores with one another."""
NEVER_ANSWERS = "#!/bin/sh\nexec sleep 3600\n"
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class RunUnderTest:
    """A run of one rank and one engine, and what a test does to it from outside."""

    def __init__(self, inputs: TinyInputs, folder: Path) -> None:
        self.folder, self.directory = folder, folder / "ended"
        self._command = arguments(inputs, folder, "ended", *ONE_RANK, "--num-rollout", "1000")
        self._command += ["--custom-rm-path", "run_support:slow_reward"]

    def start(self, *flags: str, module: tuple[str, ...] = ("recipe.train",)) -> None:
        executable, option, _, *rest = self._command
        self.process: subprocess.Popen = start([executable, option, *module, *rest, *flags])

    def wait_for(self, mark: str) -> psutil.Process:
        """The first process of the run that has `mark` in its command line."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            assert self.process.poll() is None, finish(self.process)
            found[:] = [p for p in family(self.process) if mark in " ".join(words_of(p))]
            return bool(found)

        wait_until(is_there)
        return found[0]

    def stop_next_engine(self, other_than: int) -> None:
        """Stops the engine that is started in another one's place before it can become healthy."""

        def is_there() -> bool:
            return any(engine.pid != other_than for engine in engines(psutil.Process(self.process.pid)))

        wait_until(is_there)
        [engine] = [p for p in engines(psutil.Process(self.process.pid)) if p.pid != other_than]
        os.killpg(engine.pid, signal.SIGSTOP)
        time.sleep(1)

    def wait_for_strike(self) -> int:
        """The id of the engine that `ended_run` strikes."""
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if line.endswith("is struck\n"))
        return int(line.split()[1])


def asks_sglang(run: RunUnderTest) -> None:
    """Neither its parser answers, nor the server."""
    python = run.folder / "python"
    python.write_text(NEVER_ANSWERS)
    python.chmod(0o755)
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", str(python), "--sglang-log-level", "info"]
    run.start(*flags)
    run.wait_for("ray::EngineActor")
    time.sleep(1)


def starts_ray(run: RunUnderTest) -> None:
    run.start()
    run.wait_for("gcs_server")


def starts_ranks_in_a_job(run: RunUnderTest) -> None:
    run.start(module=("recipe.cluster.launch",))
    run.wait_for("ray::RankActor")


def replaces_an_engine(run: RunUnderTest) -> None:
    """In mid rollout."""
    run.start()
    wait_for_step(run.process, run.directory, 1)
    [engine] = engines(psutil.Process(run.process.pid))
    os.killpg(engine.pid, signal.SIGKILL)
    run.stop_next_engine(engine.pid)


def replaces_an_engine_between_rollouts(run: RunUnderTest) -> None:
    run.start(module=("ended_run", "between"))
    run.stop_next_engine(run.wait_for_strike())


def sends_weights(run: RunUnderTest) -> None:
    run.start(module=("ended_run", "weights"))
    run.wait_for_strike()
    time.sleep(1)


@pytest.mark.parametrize(
    ("reach", "number", "expected"),
    [
        (asks_sglang, signal.SIGINT, INTERRUPTED),
        (starts_ray, signal.SIGTERM, TERMINATED),
        (starts_ranks_in_a_job, signal.SIGINT, INTERRUPTED),
        (replaces_an_engine, signal.SIGINT, INTERRUPTED),
        (replaces_an_engine_between_rollouts, signal.SIGTERM, SAVED_STATUS),
        (sends_weights, signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_run_ends_soon_wherever_it_is(
    reach: Callable[[RunUnderTest], None], number: signal.Signals, expected: int, inputs: TinyInputs, tmp_path: Path
) -> None:
    run = RunUnderTest(inputs, tmp_path)
    with leaves_nothing(str(tmp_path)) as take_note:
        reach(run)
        take_note(run.process)
        began = time.monotonic()
        run.process.send_signal(number)
        status, output = finish(run.process)
        took_s = time.monotonic() - began
    print(f"{reach.__name__}: {took_s:.1f} s", file=sys.stderr)
    assert status == expected, output
    assert took_s < ENDS_WITHIN_S, output
    assert "Traceback" not in output
    if (run.directory / "metrics.jsonl").exists():
        assert json.loads((run.directory / "summary.json").read_text())["outcome"] == "interrupted"
    if expected == SAVED_STATUS:
        assert latest(run.directory / "checkpoints") == run.directory / "checkpoints" / "iter_0000002"
