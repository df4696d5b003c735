"""Small whole runs as a user starts them: `python -m recipe.train` in a process of its own."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
SHARED_MEMORY = Path("/dev/shm")
ROLLOUTS = 6
ONE_RANK = ("--actor-num-gpus-per-node", "1")
ONE_ENGINE, TWO_ENGINES = ("--rollout-num-gpus", "1"), ("--rollout-num-gpus", "2")
"""Flags of runs in which the number of ranks does not matter, or that of engines does: each takes seconds to start."""


@dataclass(frozen=True)
class TinyInputs:
    """A random tiny checkpoint and a few questions."""

    checkpoint: Path
    train: Path
    heldout: Path
    warmup: Path


def digits_reward(prompt: str, response: str, label: str) -> float:
    """A reward that a random model can climb: the share of digits in the response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def slow_reward(prompt: str, response: str, label: str) -> float:
    """`digits_reward`, which takes its time."""
    time.sleep(0.1)
    return digits_reward(prompt, response, label)


def parity_reward(prompt: str, response: str, label: str) -> float:
    """A reward that is often the same for all samples of a prompt."""
    return float(sum(map(ord, response)) % 2)


calls = itertools.count(1)


def held_reward(prompt: str, response: str, label: str) -> float:
    """`digits_reward`, which the run's only grading process gives REWARDS_GIVEN times, and then no more."""
    if next(calls) > int(os.environ["REWARDS_GIVEN"]):
        time.sleep(3600)
    return digits_reward(prompt, response, label)


def strike(first: psutil.Process, second: psutil.Process) -> None:
    """Stops one engine and kills another."""
    first.send_signal(signal.SIGSTOP)
    second.send_signal(signal.SIGKILL)


def engines(run: psutil.Process) -> list[psutil.Process]:
    """The engines of a run."""
    return [p for p in run.children(recursive=True) if "recipe.engines.embedded" in words_of(p)]


def words_of(process: psutil.Process) -> list[str]:
    """Its command line, while it lives."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Its variables, while it lives."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def arguments(inputs: TinyInputs, runs: Path, name: str, *more: str) -> list[str]:
    """The command line of a run of ROLLOUTS small rollouts, of two ranks and one engine."""
    flags = (
        f"--recipe tiny --hf-checkpoint {inputs.checkpoint} --prompt-data {inputs.train} --runs-dir {runs} "
        f"--name {name} "
        f"--eval-prompt-data heldout {inputs.heldout} --eval-interval 3 --save-interval 2 --num-rollout {ROLLOUTS} "
        "--rollout-batch-size 4 --n-samples-per-prompt 4 --rollout-max-response-len 8 --lr 1e-3 "
        "--num-cpus-per-rank 1 --num-cpus-per-engine 1 --rm-num-workers 1 "
        "--custom-rm-path run_support:digits_reward"
    )
    return [sys.executable, "-m", "recipe.train", *flags.split(), *ONE_ENGINE, *more]


def without_ray() -> dict[str, str]:
    """The environment of a user's shell: other tests may have set Ray's variables in this process."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """Starts a run in a process group of its own, as a shell would, with more `variables` in its environment."""
    environment = without_ray() | {"PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"} | variables
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen, timeout_s: float = 900) -> tuple[int, str]:
    """Waits for the end: exit status and output."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def run(command: list[str]) -> tuple[int, str]:
    """A whole run: exit status and output."""
    return finish(start(command))


def metrics(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl without what measures time."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if "seconds_" not in name and not name.endswith("_per_second")}
        for line in lines
    ]


def samples(directory: Path) -> list[dict]:
    """All samples of a run, rollout after rollout."""
    files = sorted((directory / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def engine_counts(lines: list[dict]) -> dict[str, int]:
    """Takes what went wrong with engines out of a run's metrics, and adds it up."""
    names = ("engine_restarts", "request_retries", "retried_tokens")
    return {name: sum(line.pop(name, 0) for line in lines) for name in names}


def wait_until(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    """Returns when `condition` holds; fails the test if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    """Returns when the run in `directory` has recorded `step`; fails with its output if it ends before."""
    path = directory / "metrics.jsonl"

    def is_done() -> bool:
        if path.exists() and path.read_bytes().count(b"\n") > step:
            return True
        assert process.poll() is None or process.stdout is None, process.stdout.read()
        return False

    wait_until(is_done)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The run's process and everything that descends from it."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


@contextmanager
def leaves_no_process(marker: str) -> Iterator[None]:
    """Afterwards no process with `marker` in its command line or environment lives."""
    try:
        yield
    except BaseException:
        for process in living(marker):
            process.kill()
        raise
    wait_until(lambda: not living(marker), 120)


@contextmanager
def leaves_nothing(marker: str) -> Iterator[Callable[[subprocess.Popen], list[psutil.Process]]]:
    """Afterwards no process of the run lives, and nothing of its shared memory is left in /dev/shm. What it yields
    takes note of the processes that a run has at that moment, whatever port they listen on, and returns them."""
    processes: list[psutil.Process] = []
    shared: set[Path] = set()

    def take_note(process: subprocess.Popen) -> list[psutil.Process]:
        found = family(process)
        processes.extend(found)
        shared.update(shared_memory_of(found))
        return found

    with leaves_no_process(marker):
        yield take_note
    wait_until(lambda: not any(lives(process) for process in processes), 120)
    made = {path for one in processes for path in SHARED_MEMORY.glob(f"torch_{one.pid}_*")}
    left = made | {path for path in shared if path.exists()}
    left -= shared_memory_of(psutil.process_iter())
    assert not left, left


def shared_memory_of(processes: Iterable[psutil.Process]) -> set[Path]:
    """What they have opened or mapped of it."""
    found: set[str] = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= {file.path for file in process.open_files()}
            found |= {str(region[0]) for region in process.memory_maps()}
    return {Path(path) for path in found if path.startswith(f"{SHARED_MEMORY}/")}


def living(marker: str) -> list[psutil.Process]:
    """Processes whose environment or command line has `marker`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(marker in word for word in words):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.pid != os.getpid()]


def lives(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its parent has not read."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def first_of(processes: Iterable[psutil.Process], mark: str) -> psutil.Process:
    """The first one that lives and has `mark` in its command line."""
    return next(process for process in processes if lives(process) and mark in " ".join(words_of(process)))


def kill_hard(process: subprocess.Popen) -> None:
    """SIGKILL to the run's own process only, as the out-of-memory killer would."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
