"""Signals to a run, and to each of its processes: nothing stays behind, and the last checkpoint is whole. Meanwhile it
keeps its doors shut."""

import re
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from doors import assert_doors_are_shut
from run_support import (
    ONE_ENGINE,
    ONE_RANK,
    TinyInputs,
    arguments,
    environment_of,
    family,
    finish,
    first_of,
    leaves_nothing,
    start,
    wait_for_step,
    wait_until,
    words_of,
)
from torch.distributed.checkpoint import FileSystemReader

from recipe.cluster.ray_processes import VITAL, _kind
from recipe.system.shutdown import SAVED_STATUS
from recipe.weights.checkpoints import latest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEY = "a key of the user's"


VICTIMS = {
    "control-service": ("gcs_server", "error: Ray's control service (gcs_server)"),
    # Ray may end the program where it stands: there may be time for one sentence only.
    "raylet": ("raylet/raylet", "stopping: Ray's node manager (raylet)"),
}
"""Kinds of process that a run cannot do without, by what their command line has, and what is said of their loss.
`test_rollouts` kills engines and the owner of one, `test_runs` the run itself."""
WATCHED = ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""All processes of Ray's whose death ends a run, as `test_ray_session` kills one."""


def test_a_run_that_loses_a_rank_names_it_and_leaves_its_checkpoint_whole(inputs: TinyInputs, tmp_path: Path) -> None:
    """In mid step: what the other rank says of it is not what is told."""
    command = until_struck(inputs, tmp_path)
    at = command.index("recipe.train")
    command[at : at + 1] = ["faulty_run", "1", "kill"]
    with leaves_nothing(str(tmp_path)) as take_note:
        process = start(command)
        wait_for_step(process, tmp_path / "struck", 2)
        take_note(process)
        status, output = finish(process)
    assert status == 2
    assert re.search(r"^error: training rank 1 died \(", output, re.MULTILINE), output
    assert "training rank 0" not in output
    assert_left_whole(tmp_path / "struck", output)


def kinds_of(processes: list[psutil.Process]) -> set[str | None]:
    """What Ray's processes say that they are, once they have said it."""
    found: set[str | None] = set()
    for process in processes:
        with suppress(psutil.Error):
            found.add(_kind(process, VITAL))
    return found


def until_struck(inputs: TinyInputs, runs: Path) -> list[str]:
    """The command line of a run that saves every step and is far from its end."""
    return arguments(inputs, runs, "struck", "--num-rollout", "1000", "--save-interval", "1", "--save-keep", "2")


def assert_left_whole(directory: Path, output: str) -> None:
    """It says in sentences what ended it, and has a checkpoint."""
    assert "Traceback" not in output, output
    newest = latest(directory / "checkpoints")
    assert newest is not None
    assert_whole(newest)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_that_loses_a_process_leaves_nothing_behind_and_its_checkpoint_is_whole(
    victim: str, inputs: TinyInputs, tmp_path: Path
) -> None:
    mark, sentence = VICTIMS[victim]
    with leaves_nothing(str(tmp_path)) as take_note:
        process = start([*until_struck(inputs, tmp_path), *ONE_RANK])
        wait_for_step(process, tmp_path / "struck", 2)
        processes = take_note(process)
        if victim == "raylet":
            assert_doors_are_shut(processes)
            wait_until(lambda: kinds_of(family(process)) == {None, *WATCHED})
        first_of(processes, mark).kill()
        status, output = finish(process)
    assert status != 0
    assert sentence in output, output
    assert_left_whole(tmp_path / "struck", output)


def test_the_launch_script_follows_its_job_and_passes_a_notice_on(inputs: TinyInputs, tmp_path: Path) -> None:
    script, environment = script_for_the_tiny_model(inputs, tmp_path)
    flags = "--recipe tiny --name launched --num-rollout 1000 --rollout-batch-size 4 --n-samples-per-prompt 4"
    more = "--rollout-max-response-len 8 --skip-eval-before-train --custom-rm-path run_support:slow_reward"
    with leaves_nothing(str(tmp_path)) as take_note:
        words = [str(script), "--runs-dir", str(tmp_path), *flags.split(), *more.split(), *ONE_RANK, *ONE_ENGINE]
        process = start(words, WANDB_API_KEY=KEY, **environment)
        wait_for_step(process, tmp_path / "launched", 1)
        processes = take_note(process)
        assert_token_is_on_no_command_line(processes)
        assert_key_is_with_the_run_alone(processes)
        process.send_signal(signal.SIGTERM)
        status, output = finish(process)
    assert status == SAVED_STATUS, output
    assert "+ ray job submit --address http://127.0.0.1:" in output
    assert "step 1/1000" in output
    assert "SIGTERM received: saving what is done" in output
    assert_left_whole(tmp_path / "launched", output)


def script_for_the_tiny_model(inputs: TinyInputs, folder: Path) -> tuple[Path, dict[str, str]]:
    """The launch script beside a file of no architecture flags, and variables with which it finds the tiny model and
    its data where the real ones would be."""
    scripts, base = folder / "scripts", folder / "base"
    (scripts / "models").mkdir(parents=True)
    (scripts / "models" / "glm4.7-30B-A3B.sh").write_text("MODEL_ARGS=()\n")
    script = scripts / "run-glm4.7-30B-A3B-8gpus.sh"
    shutil.copy(ROOT / "scripts" / script.name, script)
    for name, target in {
        "GLM-4.7-Flash": inputs.checkpoint,
        "GLM-4.7-Flash_torch_dist": inputs.checkpoint,
        "dapo-math-17k/dapo-math-17k.jsonl": inputs.train,
        "aime-2024/aime-2024.jsonl": inputs.heldout,
    }.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).symlink_to(target)
    support = Path(__file__).parent
    return script, {"BASE_DIR": str(base), "PYTHON": sys.executable, "PYTHONPATH": f"{support}:{ROOT}"}


def assert_token_is_on_no_command_line(processes: list[psutil.Process]) -> None:
    """It lies in a file that nobody else can read."""
    environments = [environment_of(process) for process in processes]
    [path] = {Path(one["RAY_AUTH_TOKEN_PATH"]) for one in environments if "RAY_AUTH_TOKEN_PATH" in one}
    assert path.stat().st_mode & 0o077 == 0
    token = path.read_text()
    assert token
    assert not [one for one in environments if token in " ".join(one.values())]
    assert not [process for process in processes if token in " ".join(words_of(process))]


def assert_key_is_with_the_run_alone(processes: list[psutil.Process]) -> None:
    """Ray's processes, ranks and engines do without; a reward of the user's may need it."""
    holders = {" ".join(words_of(process)) for process in processes if KEY in environment_of(process).values()}
    assert any("recipe.train" in words for words in holders), "the job has it again"
    known = ("run-glm4.7", "recipe.cluster.launch", "recipe.train", "recipe.rewards.serve", "recipe.system.reaper")
    assert not [words for words in holders if not any(name in words for name in known)]


def assert_whole(checkpoint: Path) -> None:
    """Every piece that the checkpoint's index names lies within its file."""
    pieces = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    assert pieces
    for piece in pieces:
        assert piece.offset + piece.length <= (checkpoint / piece.relative_path).stat().st_size
