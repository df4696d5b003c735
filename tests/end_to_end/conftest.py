import fcntl
import os
from pathlib import Path

import pytest
from run_support import TinyInputs, arguments, run

from recipe.data.arithmetic_task import main as write_arithmetic
from recipe.weights.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder / "hf", seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["arithmetic", "--output", str(folder), "--seed", "3", "--heldout", "8"])
        write_arithmetic()
    return TinyInputs(folder / "hf", folder / "train.jsonl", folder / "heldout.jsonl", folder / "warmup.jsonl")


@pytest.fixture(scope="session")
def uninterrupted(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed: one for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    runs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "uninterrupted"
    runs.mkdir(exist_ok=True)
    done = runs / "done"
    with (runs / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            status, output = run(arguments(inputs, runs, "whole"))
            assert status == 0, output
            done.touch()
    return runs / "whole"
