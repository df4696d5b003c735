"""Which checkpoint is the newest, which may be deleted, and where a run begins."""

import json
import shutil
from pathlib import Path

import pytest

from recipe.system.errors import UserError
from recipe.weights.checkpoints import (
    LATEST,
    PROGRESS,
    StartPoint,
    claim,
    find_start,
    latest,
    note_written,
    rollouts_in,
)


def write(folder: Path, rollouts: int, keep: int | None = None, *, beside_others: bool = False) -> Path:
    """As the trainer does."""
    checkpoint = make(folder / f"iter_{rollouts:07d}", rollouts)
    note_written(checkpoint, rollouts, keep, beside_others=beside_others)
    return checkpoint


def make(checkpoint: Path, rollouts: int) -> Path:
    checkpoint.mkdir(parents=True)
    (checkpoint / PROGRESS).write_text(json.dumps({"rollouts": rollouts}))
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def test_what_a_run_wrote_last_is_the_newest_and_nothing_else_is_deleted(tmp_path: Path) -> None:
    copy = make(tmp_path / "iter_best", 9)
    foreign = make(tmp_path / "iter_0000006", 6)
    for rollouts in (2, 4, 5):
        newest = write(tmp_path, rollouts, keep=2)
        assert latest(tmp_path) == newest
    assert names(tmp_path) == ["iter_0000004", "iter_0000005", foreign.name, copy.name]


def test_a_checkpoint_for_which_none_goes_is_one_too_many_until_the_next_is_begun(tmp_path: Path) -> None:
    """Never more than `keep` and the new one."""
    for rollouts in (2, 4):
        write(tmp_path, rollouts, 2)
    for rollouts in (5, 6, 7):  # runs that go on, and fail before their next save
        newest = write(tmp_path, rollouts, 2, beside_others=True)
        assert names(tmp_path) == ["iter_0000002", "iter_0000004", newest.name]
    claim(tmp_path / "iter_0000008", keep=2)
    assert names(tmp_path) == ["iter_0000004", "iter_0000007"]
    write(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["iter_0000007", "iter_0000008"]


def test_what_lies_in_a_checkpoints_place_is_kept_under_another_name(tmp_path: Path) -> None:
    place = make(tmp_path / "iter_0000002", 9)
    claim(place)
    [kept] = tmp_path.glob("iter_0000002.kept-*")
    assert (rollouts_in(kept), place.exists(), latest(tmp_path)) == (9, False, None)
    make(place, 2)  # the run is killed before it says so
    claim(place)
    assert rollouts_in(place) == 2, "it was the run's own"


def test_a_checkpoint_written_again_is_the_newest_once(tmp_path: Path) -> None:
    for rollouts in (2, 4):
        write(tmp_path, rollouts, keep=2)
    shutil.rmtree(tmp_path / "iter_0000004")
    write(tmp_path, 4, keep=2)
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["iter_0000004", "iter_0000006"]


@pytest.mark.parametrize("tracker", [None, "", "release", "7", "-4"])
def test_without_a_tracker_that_names_one_the_highest_number_counts(tmp_path: Path, tracker: str | None) -> None:
    write(tmp_path, 9_999_999)
    newest = write(tmp_path, 10_000_000)  # one digit more
    make(tmp_path / "iter_best", 1)
    (tmp_path / LATEST).unlink()
    if tracker is not None:
        (tmp_path / LATEST).write_text(tracker)
    assert latest(tmp_path) == newest
    (newest / PROGRESS).unlink()
    assert latest(tmp_path) == tmp_path / "iter_9999999"


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"rollouts": "4"}'])
def test_damage_is_told_with_the_checkpoint_before(tmp_path: Path, content: str) -> None:
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    (newest / PROGRESS).write_text(content)
    with pytest.raises(UserError, match=r"iter_0000004 is damaged, its progress.json .* goes on from iter_0000002"):
        rollouts_in(newest)


def test_load_takes_the_newest_of_a_folder_or_the_checkpoint_that_it_names(resolve, tmp_path: Path) -> None:
    own, other = tmp_path / "runs" / "run" / "checkpoints", tmp_path / "other"
    older, newest = write(own, 2), write(own, 4)

    def start(load: Path | str, **more: object) -> StartPoint:
        return find_start(resolve(checkpoint={"load": load, **more}).config)

    assert start(own) == start(newest) == StartPoint(checkpoint=newest)
    with pytest.raises(UserError, match=r"goes on beyond iter_0000002, up to iter_0000004, .* another --name"):
        start(older)
    assert start(older, save=other) == StartPoint(checkpoint=older)
    write(other, 1)
    with pytest.raises(UserError, match=r"other holds checkpoints of an earlier run: go on with --load .*other, or"):
        start(older, save=other)


def test_a_run_begins_anew_only_where_nothing_is_written_over(resolve, tmp_path: Path) -> None:
    own = tmp_path / "runs" / "run" / "checkpoints"
    assert find_start(resolve().config) == StartPoint()
    first = find_start(resolve(checkpoint={"load": own}).config)
    assert first.checkpoint is None
    assert "holds no checkpoint yet" in str(first.note)
    write(own, 2)
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run: go on with --load"):
        find_start(resolve().config)


@pytest.mark.parametrize(
    ("load", "told"),
    [("nowhere", "does not exist"), ("file", "is a file"), ("folder", "holds neither checkpoints nor weights")],
)
def test_load_of_nothing_is_refused(resolve, tmp_path: Path, load: str, told: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"--load .*{load} {told}: name a folder of checkpoints"):
        find_start(resolve(checkpoint={"load": tmp_path / load}).config)
