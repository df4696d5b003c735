"""A step that a run kept, as a user asks for it: the bill of its train/rollout difference, and the step once more."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_support import ONE_RANK, TinyInputs, arguments, metrics, run

from recipe.again.step import replay_step
from recipe.mismatch.__main__ import score
from recipe.system.errors import UserError

pytestmark = pytest.mark.slow


def mismatch(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipe.mismatch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def replayed(directory: Path, *flags: str) -> list[dict[str, float]]:
    """What step 3 is once more, and changed."""
    command = [sys.executable, "-m", "recipe.train", "--replay-step", f"{directory}:3", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = [re.split(r"  +", row.strip()) for row in ended.stdout.splitlines()[2:-1]]
    return [{name: float(values[column]) for name, *values in rows} for column in (1, 2)]


def test_the_parts_of_a_runs_difference_are_told_and_add_up(inputs: TinyInputs, tmp_path: Path) -> None:
    """The trainer in bf16, the engine in fp32, and some tokens of older weights: what is computed again is what the
    run measured, to the last digits of its log-probs. So is the step, taken once more; a change of it shows."""
    flags = (
        "--bf16 --num-rollout 3 --save-interval 1 --skip-eval-before-train --over-sampling-batch-size 8 "
        "--partial-rollout --rollout-max-response-len 40 --rollout-max-concurrency 3 --use-tis"
    )
    status, output = run(arguments(inputs, tmp_path, "bf16", *ONE_RANK, *flags.split()))
    assert status == 0, output
    directory = tmp_path / "bf16"
    assert [path.name for path in (directory / "kept_steps").iterdir()] == ["000003.npz"]
    ended = mismatch(directory, "--json")
    assert ended.returncode == 0, ended.stderr
    bill = json.loads(ended.stdout[ended.stdout.index("{") :])
    line = metrics(directory)[-1]
    assert line["step"] == bill["step"] == 3
    assert bill["measured_in_run"] == line["logprob_diff_mean"]
    parts = {part["name"]: part for part in bill["parts"]}
    assert {"decoding", "engine", "trainer", "routing"} <= parts.keys()
    assert sum(part["share"] for part in bill["parts"]) == pytest.approx(1, abs=1e-6)
    assert bill["together"]["largest"] == pytest.approx(line["logprob_diff_max"], rel=1e-3)
    assert parts["decoding"]["mean"] < 1e-5
    assert parts["engine"]["mean"] < 1e-5
    assert parts["trainer"]["mean"] > 1e-5
    assert len(bill["rerouted"]) == 3
    clipped = ("--clip-grad", str(line["grad_norm"] / 10), "--tis-level", "sequence")
    once_more, changed = replayed(directory, *clipped)
    for name in ("loss", "grad_norm", "logprob_diff_mean", "tis_weight", "entropy"):
        assert once_more[name] == pytest.approx(line[name], rel=1e-4), name
    assert changed["logprob_diff_mean"] == once_more["logprob_diff_mean"]
    assert changed["tis_weight"] != once_more["tis_weight"]
    assert 0 < changed["norm of the update"] < once_more["norm of the update"]
    for words, sentence in (
        ((f"{directory}:3", "--use-rollout-routing-replay"), "were not asked where they took tokens"),
        ((f"{directory}:3", "--eps-clip", "2"), "--eps-clip 2"),
        ((directory,), "is not of the form RUN:N"),
    ):
        with pytest.raises(UserError, match=sentence):
            list(replay_step(["--replay-step", *map(str, words)]))
    shutil.rmtree(directory / "checkpoints" / "iter_0000002")
    for step, sentence in ((3, "iter_0000002, which is not there"), (2, "not kept")):
        with pytest.raises(UserError, match=sentence):
            score(directory, step, None)
    ended = mismatch(tmp_path)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
