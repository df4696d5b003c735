"""A training rank that hangs is named, in time, and nothing of the run stays behind; `test_signals` kills one."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_support import TinyInputs, finish, leaves_no_process, start

pytestmark = pytest.mark.slow

TIMEOUT_S = 40


def runs_in_which_rank_1(ways: Sequence[str], inputs: TinyInputs, runs: Path) -> list[str]:
    """The outputs of supervised runs, at the same time, in which rank 1 of two fails; see `faulty_run`."""
    flags = (
        f"--hf-checkpoint {inputs.checkpoint} --prompt-data {inputs.warmup} --runs-dir {runs} --apply-chat-template "
        "--loss-type sft --num-rollout 20 --rollout-batch-size 4 --rollout-max-response-len 12 --mtp-num-layers 1 "
        "--device cpu --no-bf16 --actor-num-gpus-per-node 2 --rollout-engine embedded --lr 1e-3 "
        f"--distributed-timeout-minutes {TIMEOUT_S / 60}"
    )
    with leaves_no_process(str(runs)):
        started = [start([sys.executable, "-m", "faulty_run", "1", way, *flags.split(), "--name", way]) for way in ways]
        finished = [finish(process) for process in started]
    for status, output in finished:
        assert status == 2, output
        assert "Traceback" not in output
        assert "gave up" not in output, "torch.distributed was faster"
    return [output for _, output in finished]


@dataclass(frozen=True)
class Hung:
    """Output of a run that came to a standstill, and where all its ranks were."""

    output: str
    report: str


@pytest.fixture(scope="module")
def hung(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hung]:
    """A run in which rank 1 falls asleep and one in which it is stopped."""
    runs, ways = tmp_path_factory.mktemp("hung"), ("sleep", "stop")
    outputs = runs_in_which_rank_1(ways, inputs, runs)
    reports = [(runs / way / "hung-ranks.txt").read_text() for way in ways]
    return dict(zip(ways, map(Hung, outputs, reports), strict=True))


def test_a_rank_that_sleeps_is_named_with_its_stack(hung: dict[str, Hung]) -> None:
    output = hung["sleep"].output
    [(rank, seconds, place, waiting)] = re.findall(
        r"^error: training rank (\d) \(pid \d+ on \S+\) got nothing done for (\d+) s, in (.*); the others wait for it "
        r"in (.*?);",
        output,
        re.MULTILINE,
    )
    assert rank == "1"
    assert 0.5 * TIMEOUT_S < int(seconds) < TIMEOUT_S
    assert "(fall_asleep)" in place
    assert "megatron" in waiting
    assert output.rstrip().endswith("time.sleep(3600)")
    of_rank_0, of_rank_1 = hung["sleep"].report.split("\ntraining rank ")[1:]
    assert "fall_asleep" in of_rank_1
    assert "fall_asleep" not in of_rank_0
    assert "torch/distributed" in of_rank_0


def test_a_rank_that_is_stopped_is_named_as_silent(hung: dict[str, Hung]) -> None:
    output = hung["stop"].output
    assert re.search(r"^error: training rank 1 \(pid \d+ on \S+\) does not answer", output, re.MULTILINE)
    assert "training rank 0" not in output
    assert "torch/distributed" in hung["stop"].report
