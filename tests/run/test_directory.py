"""The run directory: nothing lost, nothing twice, nothing secret, whatever ends the run."""

import errno
import json
from asyncio import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import sample_record, step_metrics

from recipe.messages import Evaluated
from recipe.run.conditions import Conditions
from recipe.run.directory import RunDirectory
from recipe.run.outputs import check_outputs
from recipe.run.shown_tokens import ShownTokens
from recipe.run.watch.files import RunFiles
from recipe.system.errors import UserError

CHECKPOINTS = "checkpoints"


def lines_of(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict) -> dict:
    return {k: v for k, v in line.items() if not k.startswith("seconds_") and not k.endswith("_per_second")}


def do_steps(run: RunDirectory, steps: range, seconds: float = 2.0) -> None:
    for step in steps:
        if step:
            run.record_rollout(step - 1, [sample_record(4 * step + i) for i in range(4)])
        run.record(step_metrics(step, seconds, **({"heldout": 0.4 + step / 10} if step % 2 == 0 else {})))


def let_go(run: RunDirectory) -> None:
    """As the kernel does when the run's process is killed."""
    run._lock.release()


def end_with(run: RunDirectory, error: BaseException) -> None:
    """One step, then the error."""
    with run:
        run.start(0)
        do_steps(run, range(2))
        raise error


@pytest.fixture
def continued(resolve, tmp_path):
    return resolve(checkpoint={"load": tmp_path / "runs" / "run" / CHECKPOINTS})


def test_a_finished_run_says_what_it_came_to(resolve):
    start = {"ray": 1.0}
    with RunDirectory(resolve()) as run:
        run.record_start(start)
        run.start(0)
        start["ranks"] = 2.0
        do_steps(run, range(5))
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["outcome"] == "finished"
    assert summary["steps"] == 4
    assert summary["eval"]["before"] == pytest.approx(0.4)
    assert summary["eval"]["after"] == pytest.approx(0.8)
    assert summary["eval"]["sets"]["heldout"]["after_ci95"] == pytest.approx([0.7, 0.9])
    assert summary["seconds"]["step"] == pytest.approx(8.0)
    assert summary["start"] == {"ray": 1.0, "ranks": 2.0}
    assert summary["wall_s"] > 0
    assert (run.path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in sorted((run.path / "rollouts").iterdir())] == [f"{i:06}.jsonl" for i in range(4)]
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_line_is_on_disk_and_flat_as_soon_as_it_is_recorded(resolve):
    run = RunDirectory(resolve())
    run.start(0)
    run.record(step_metrics(1, heldout=0.5))
    (line,) = lines_of(run)
    assert line["step"] == 1
    assert line["eval/heldout"] == 0.5
    assert line["eval/heldout_ci95_low"] == 0.4
    assert line["samples_per_second"] == pytest.approx(8 / 1.5)  # the evaluation's half second is not in the rate
    assert all(isinstance(value, int | float) for value in line.values())


@pytest.mark.parametrize("steps_done", [0, 1, 3, 5])
def test_a_continued_run_is_an_uninterrupted_one_but_for_times(resolve, continued, tmp_path, steps_done):
    whole = RunDirectory(resolve(misc={"name": "whole", "runs_dir": tmp_path / "runs"}))
    whole.start(0)
    do_steps(whole, range(6))

    killed = RunDirectory(resolve())
    killed.start(0)
    do_steps(killed, range(6), seconds=3.0)
    killed.record_rollout(5, [sample_record(99)])
    with (killed.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "rew')  # killed in mid-write
    let_go(killed)

    again = RunDirectory(continued)
    again.start(steps_done)
    do_steps(again, range(steps_done + 1 if steps_done else 0, 6), seconds=4.0)
    assert [without_times(line) for line in lines_of(again)] == [without_times(line) for line in lines_of(whole)]
    for file in (whole.path / "rollouts").iterdir():
        assert (again.path / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert len(list((again.path / "rollouts").iterdir())) == 5


def test_continuing_keeps_earlier_lines_byte_for_byte_and_the_earlier_manifest(resolve, continued):
    first = RunDirectory(resolve())
    first.start(0)
    do_steps(first, range(4))
    before = (first.path / "metrics.jsonl").read_bytes()
    let_go(first)
    again = RunDirectory(continued)
    again.start(3)
    assert (again.path / "metrics.jsonl").read_bytes() == before
    manifest = json.loads((again.path / "manifest.json").read_text())
    assert manifest["config"]["checkpoint"]["load"] is not None
    assert [earlier["config"]["checkpoint"]["load"] for earlier in manifest["earlier"]] == [None]


def test_checkpoints_in_a_folder_named_from_where_the_run_began_are_found_from_elsewhere(
    resolve, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with RunDirectory(resolve(checkpoint={"save": Path("saved")})) as run:
        run.start(0)
        do_steps(run, range(3))
    saved = tmp_path / "saved" / "iter_0000002"
    saved.mkdir(parents=True)
    (saved / ".metadata").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files = RunFiles(tmp_path / run.path)
    files.refresh()
    assert files.checkpoint().step == 2


@pytest.mark.parametrize("load", [None, "elsewhere/checkpoints"])
def test_a_run_is_never_overwritten(resolve, tmp_path, load):
    first = RunDirectory(resolve())
    first.start(0)
    do_steps(first, range(2))
    let_go(first)
    with pytest.raises(UserError, match=r"holds a run already: go on with it by --load .*checkpoints, or choose"):
        RunDirectory(resolve(checkpoint={"load": load and tmp_path / load}))
    assert len(lines_of(first)) == 2


def test_a_run_that_never_made_a_step_may_begin_anew(resolve):
    let_go(RunDirectory(resolve()))
    again = RunDirectory(resolve())
    again.start(0)
    do_steps(again, range(1))
    assert len(lines_of(again)) == 1


def test_a_checkpoint_of_another_run_begins_a_new_one_at_its_step(resolve, tmp_path):
    run = RunDirectory(resolve(checkpoint={"load": tmp_path / "elsewhere"}))
    run.start(3)
    do_steps(run, range(4, 6))
    assert [line["step"] for line in lines_of(run)] == [4, 5]


def test_the_manifest_tells_how_to_repeat_the_run_and_no_secret(resolve, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush-environment")
    sglang = {"args": {"api_key": "hush-flag", "ssl_keyfile_password": "hush-password", "mem_fraction_static": 0.7}}
    run = RunDirectory(resolve(sglang=sglang))
    text = (run.path / "manifest.json").read_text()
    assert "hush" not in text
    manifest = json.loads(text)
    assert manifest["config"]["sglang"]["args"]["mem_fraction_static"] == 0.7
    assert manifest["config"]["data"]["input_key"] == "prompt"
    assert manifest["config"]["rollout"]["rollout_batch_size"] == 2
    assert manifest["seed"] == 7
    assert manifest["sources"] == {"misc.seed": "flag"}
    assert manifest["versions"]["packages"]["pydantic"]
    assert set(manifest["git"] or {"commit", "dirty"}) == {"commit", "dirty"}
    assert {Path(name).name for name in manifest["sha256"]} == {"config.json", "train.jsonl"}


def test_the_summary_tells_why_a_run_failed(resolve):
    run = RunDirectory(resolve())
    with pytest.raises(UserError):
        end_with(run, UserError("three steps in a row had no finite gradient"))
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["outcome"] == "failed: three steps in a row had no finite gradient"
    assert summary["steps"] == 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), CancelledError()], ids=["plain", "in a coroutine"])
def test_an_interrupted_run_has_a_summary(resolve, interruption):
    run = RunDirectory(resolve())
    with pytest.raises(type(interruption)):
        end_with(run, interruption)
    assert json.loads((run.path / "summary.json").read_text())["outcome"] == "interrupted"


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync fails from now on, as on a disk that filled up while writing."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)


def test_a_full_disk_is_one_sentence_and_leaves_whole_files(resolve, monkeypatch):
    run = RunDirectory(resolve())
    run.start(0)
    do_steps(run, range(3))
    metrics = (run.path / "metrics.jsonl").read_bytes()
    rollout = (run.path / "rollouts" / "000001.jsonl").read_bytes()
    fill_disk(monkeypatch)
    with pytest.raises(UserError, match=r"the disk is full: .*metrics\.jsonl could not be written; free space"):
        run.record(step_metrics(3))
    with pytest.raises(UserError, match=r"the disk is full: .*000001\.jsonl"):
        run.record_rollout(1, [sample_record(1)])
    assert (run.path / "metrics.jsonl").read_bytes() == metrics
    assert (run.path / "rollouts" / "000001.jsonl").read_bytes() == rollout
    assert len(list((run.path / "rollouts").iterdir())) == 2


def fail_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch)
    raise UserError("the engine died")


def test_a_full_disk_does_not_hide_why_the_run_failed(resolve, monkeypatch):
    run = RunDirectory(resolve())
    with pytest.raises(UserError, match="the engine died"), run:
        fail_on_a_full_disk(monkeypatch)


def test_damage_in_the_middle_is_not_guessed_at(resolve, continued):
    run = RunDirectory(resolve())
    run.start(0)
    do_steps(run, range(3))
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 1', '{"step": 1, oops', 1))
    let_go(run)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 2"):
        RunDirectory(continued)


def test_two_runs_of_one_name_do_not_meet(resolve):
    run = RunDirectory(resolve())
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"a run is at work in .*runs/run: choose another --name"):
        RunDirectory(resolve())
    assert (run.path / "manifest.json").read_bytes() == before
    with run:
        pass
    RunDirectory(resolve())


def test_an_export_replaces_what_the_run_wrote_and_nothing_else(resolve, tmp_path):
    template = tmp_path / "hf-{rollout_id}"
    config = resolve(checkpoint={"save_hf": template})
    own, notes = tmp_path / "hf-2", tmp_path / "hf-4"
    run = RunDirectory(config)
    run.claim_export(own)
    own.mkdir()
    (own / "config.json").touch()
    run.claim_export(own)
    let_go(run)
    RunDirectory(config).claim_export(own)  # a resumed run repeats the step
    for other in (notes, tmp_path / "hf-old"):
        other.mkdir()
        (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--save-hf .*hf-4 exists, and this run did not write it"):
        check_outputs(config.config)
    with pytest.raises(UserError, match=r"hf-4 exists"):
        run.claim_export(notes)
    assert (notes / "notes.txt").read_text() == "mine"
    notes.joinpath("notes.txt").unlink()
    check_outputs(config.config)  # an empty folder is nobody's loss; hf-old has no number


@pytest.mark.parametrize("flag", ["save", "save_hf"])
def test_outputs_that_cannot_be_written_are_refused_at_the_start(resolve, tmp_path, flag):
    (tmp_path / "file").touch()
    for place, told in (
        (tmp_path / "file" / "x" / "y", "is no folder"),
        ("/proc/x/y", "nothing can be written in"),
    ):
        with pytest.raises(UserError, match=rf"--{flag.replace('_', '-')} .*{told}"):
            check_outputs(resolve(checkpoint={flag: place}).config)
    assert not list(tmp_path.glob("runs*"))


def test_values_that_are_not_finite_stay_json(resolve):
    run = RunDirectory(resolve())
    run.start(0)
    metrics = step_metrics(1)
    run.record(replace(metrics, values={**metrics.values, "grad_norm": float("nan")}))
    assert lines_of(run)[0]["grad_norm"] is None


def test_use_wandb_without_wandb_is_one_sentence(resolve, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="--use-wandb needs the package wandb"):
        RunDirectory(resolve(misc={"name": "run", "runs_dir": tmp_path / "runs", "use_wandb": True}))


class FakeWandb:
    """Weights & Biases as far as a run uses it."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.lines: list[dict] = []
        self.failure: Exception | None = None

    def init(self, **settings):
        self._fail()
        self.ids.append(settings["id"])
        return self

    def log(self, values: dict, step: int) -> None:
        self._fail()
        self.lines.append({"step": step} | values)

    def finish(self) -> None:
        self._fail()

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    return fake


def test_wandb_goes_on_in_a_continued_run_and_begins_another_for_a_fresh_one(resolve, tmp_path, wandb):
    misc = {"name": "run", "runs_dir": tmp_path / "runs", "use_wandb": True}
    for load in (None, tmp_path / "runs" / "run" / CHECKPOINTS):
        run = RunDirectory(resolve(misc=misc, checkpoint={"load": load}))
        run.start(1)
        run.record(step_metrics(2))
        let_go(run)
    RunDirectory(resolve(misc=misc | {"runs_dir": tmp_path / "others"}))
    first, continued, fresh = wandb.ids
    assert first == continued != fresh
    assert [line["step"] for line in wandb.lines] == [2, 2]


def test_wandb_that_is_lost_ends_no_run(resolve, tmp_path, wandb, caplog):
    with RunDirectory(resolve(misc={"name": "run", "runs_dir": tmp_path / "runs", "use_wandb": True})) as run:
        run.start(0)
        wandb.failure = ConnectionResetError("the server has left")
        do_steps(run, range(3))
    assert json.loads((run.path / "summary.json").read_text())["outcome"] == "finished"
    assert [record.message for record in caplog.records] == [
        "Weights & Biases gets no more metrics (the server has left); metrics.jsonl has all"
    ]


def test_wandb_that_does_not_start_is_told_before_anything_starts(resolve, tmp_path, wandb):
    wandb.failure = RuntimeError("api_key not configured (no-tty)\ncall wandb login")
    with pytest.raises(UserError, match=r"does not start \(api_key not configured \(no-tty\)\): set WANDB_API_KEY, or"):
        RunDirectory(resolve(misc={"name": "run", "runs_dir": tmp_path / "runs", "use_wandb": True}))


def do_watched_step(run: RunDirectory, step: int) -> None:
    """Everything that a step leaves for whoever watches the run."""
    tokens = ShownTokens(line=0, pieces=["a"], log_probs=[-step], advantages=[0.0], trainer_log_probs=None)
    if step:
        run.record_rollout(step - 1, [sample_record(4 * step + i) for i in range(4)], [tokens])
    run.record_evaluation(step, {"heldout": Evaluated({}, (step / 10, 0.5), 4)})
    run.record_conditions(Conditions(step, host_memory_used=step, host_memory=100))
    run.record(step_metrics(step, heldout=0.5))


WATCHED = ("samples.jsonl", "evals.jsonl", "conditions.jsonl", "tokens", "rollouts")


def left_in(run: Path) -> dict[str, bytes]:
    """What whoever watches the run reads, by file."""
    paths = [path for name in WATCHED for path in sorted([run / name, *(run / name).glob("*")])]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.parametrize("loaded", [0, 2])
def test_what_a_watcher_reads_of_a_killed_and_resumed_run_is_the_uninterrupted_ones(
    loaded: int, resolve, continued, tmp_path: Path
) -> None:
    with RunDirectory(resolve()) as whole:
        whole.start(0)
        for step in range(5):
            do_watched_step(whole, step)
    expected = left_in(whole.path)
    whole.path.rename(tmp_path / "whole")

    killed = RunDirectory(resolve())
    killed.start(0)
    for step in range(7):
        do_watched_step(killed, step)
    let_go(killed)
    with RunDirectory(continued) as again:
        again.start(loaded)
        for step in range(loaded + 1 if loaded else 0, 5):
            do_watched_step(again, step)
    assert left_in(again.path) == expected
    assert len(expected) == 3 + 4 + 4
