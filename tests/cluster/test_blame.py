"""Who is to blame, on made-up answers of ranks."""

import os
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from recipe.cluster.hang_diagnosis import RankState, Reason, Verdict, blame, flushes, waits
from recipe.cluster.hang_report import RankSnapshot, all_stacks, sentence, short_stacks
from recipe.system.heartbeat import Frame, RankLocation

PACKAGES = "/venv/lib/python3.11/site-packages"
STEP = Frame("/repo/recipe/megatron/step.py", 130, "forward_backward", "results = _run(chunks)")
WORK = Frame("/repo/recipe/megatron/microbatch.py", 80, "build_microbatch", "tokens = numpy.concatenate(parts)")
OTHER_WORK = Frame("/repo/recipe/megatron/adam.py", 200, "step", "self._copy(slot)")
SYNC = Frame("/repo/recipe/megatron/step.py", 205, "clipped_step", "norm = total.item()")
OTHER_SYNC = Frame(f"{PACKAGES}/megatron/core/optimizer/clip_grads.py", 90, "norm", "return total.cpu()")
COLLECTIVE = Frame(f"{PACKAGES}/torch/distributed/distributed_c10d.py", 3000, "all_reduce", "work.wait()")
LIBRARY = Frame("/usr/lib/python3.11/contextlib.py", 144, "__exit__", "next(self.gen)")
PIPELINE = Frame(f"{PACKAGES}/megatron/core/pipeline_parallel/p2p_communication.py", 300, "_recv", "req.wait()")
WRITER = Frame(f"{PACKAGES}/torch/distributed/checkpoint/filesystem.py", 300, "_write_item", "stream.write(data)")
LAUNCH = Frame(f"{PACKAGES}/torch/nn/functional.py", 100, "linear", "return _linear(input, weight)")


def at(*frames: Frame, beats: int = 5) -> RankState:
    return RankState(RankLocation(beats, (STEP, *frames)))


SILENT = RankState(None)
DONE = RankState(RankLocation(6, ()), finished=True)
GAVE_UP = RankState(RankLocation(5, ()), gave_up=True)


@pytest.mark.parametrize(
    ("states", "reason", "ranks"),
    [
        pytest.param([at(COLLECTIVE), at(WORK)], Reason.ELSEWHERE, {1}, id="one works while the other waits"),
        pytest.param([at(WORK), at(COLLECTIVE)], Reason.ELSEWHERE, {0}, id="rank 0 is not above suspicion"),
        pytest.param([at(LIBRARY, COLLECTIVE), at(LIBRARY)], Reason.ELSEWHERE, {1}, id="a wait inside the library"),
        pytest.param([at(PIPELINE), at(WORK)], Reason.ELSEWHERE, {1}, id="a wait for another pipeline stage"),
        pytest.param([at(COLLECTIVE), at(WRITER)], Reason.ELSEWHERE, {1}, id="writing a checkpoint is no waiting"),
        pytest.param([at(WORK), at(COLLECTIVE), at(WORK)], Reason.ELSEWHERE, {0, 2}, id="two hang in the same place"),
        pytest.param([at(SYNC), at(WORK), at(SYNC), at(SYNC)], Reason.ELSEWHERE, {1}, id="NCCL: waiters ask the GPU"),
        pytest.param([at(SYNC), at(COLLECTIVE), at(OTHER_SYNC), at(WORK)], Reason.ELSEWHERE, {3}, id="NCCL: all ways"),
        pytest.param(
            [at(LAUNCH), at(WORK), at(LAUNCH), at(LAUNCH), at(SYNC)], Reason.APART, {1}, id="NCCL: the queue is full"
        ),
        pytest.param([at(SYNC), at(SYNC), at(OTHER_SYNC)], Reason.APART, {2}, id="NCCL: another collective"),
        pytest.param([at(WORK), at(WORK), at(OTHER_WORK)], Reason.APART, {2}, id="none waits, one is elsewhere"),
        pytest.param([at(SYNC), at(SYNC, beats=4), at(SYNC)], Reason.BEHIND, {1}, id="one did less"),
        pytest.param([at(SYNC), at(SYNC, beats=6), at(SYNC)], Reason.UNKNOWN, {0, 1, 2}, id="one did more"),
        pytest.param([at(SYNC), at(SYNC)], Reason.UNKNOWN, {0, 1}, id="all alike"),
        pytest.param([at(SYNC), at(OTHER_SYNC)], Reason.UNKNOWN, {0, 1}, id="two that differ"),
        pytest.param([at(COLLECTIVE), at(WORK), SILENT], Reason.SILENT, {2}, id="no answer tells most"),
        pytest.param([DONE, at(WORK), DONE], Reason.ELSEWHERE, {1}, id="the others are done"),
        pytest.param([DONE, at(COLLECTIVE)], Reason.ELSEWHERE, {1}, id="it waits for those that are done"),
        pytest.param([GAVE_UP, at(WORK), at(COLLECTIVE)], Reason.ELSEWHERE, {1}, id="who gave up had waited"),
        pytest.param([GAVE_UP, at(COLLECTIVE)], Reason.UNKNOWN, {0, 1}, id="both had waited"),
        pytest.param([GAVE_UP, GAVE_UP, DONE], Reason.UNKNOWN, {0, 1}, id="all gave up"),
        pytest.param([at(WORK)], Reason.ELSEWHERE, {0}, id="there is one rank only"),
    ],
)
def test_blame(states: list[RankState], reason: Reason, ranks: set[int]) -> None:
    verdict = blame(dict(enumerate(states)))
    assert verdict.reason is reason
    assert set(verdict.ranks) == ranks


def test_a_rank_without_work_does_not_wait() -> None:
    assert not waits(())


def told(states: list[RankState]) -> tuple[Verdict, Mapping[int, RankSnapshot], str]:
    snapshots = {
        rank: RankSnapshot(f"pid {rank + 100} on host", state, state.seen, 480.0, "Timed out" * state.gave_up)
        for rank, state in enumerate(states)
    }
    verdict = blame(dict(enumerate(states)))
    return verdict, snapshots, sentence(verdict, snapshots)


def test_the_sentence_names_the_rank_its_place_and_who_waits() -> None:
    verdict, snapshots, text = told([at(COLLECTIVE), at(WORK), GAVE_UP])
    assert text == (
        "training rank 1 (pid 101 on host) got nothing done for 480 s, in recipe/megatron/microbatch.py line 80 "
        "(build_microbatch); the others wait for it in recipe/megatron/step.py line 130 (forward_backward); training "
        "rank 2 gave up: Timed out"
    )
    assert "numpy.concatenate" in short_stacks(verdict, snapshots)
    assert "work.wait()" not in short_stacks(verdict, snapshots)
    assert "work.wait()" in all_stacks(snapshots)


def test_what_cannot_be_told_is_not_told() -> None:
    _, _, text = told([at(SYNC), at(SYNC), at(OTHER_SYNC), at(OTHER_SYNC)])
    assert text.startswith("training rank 0 (pid 100 on host), training rank 1 (pid 101 on host), training rank 2 ")
    assert text.endswith(
        "and which is to blame cannot be told: ranks 0 and 1 in recipe/megatron/step.py line 205 (clipped_step) and "
        "ranks 2 and 3 in megatron/core/optimizer/clip_grads.py line 90 (norm)"
    )


def test_a_rank_that_is_the_only_one_apart_is_called_likely() -> None:
    _, _, text = told([at(SYNC), at(SYNC), at(OTHER_SYNC)])
    assert "most likely because of training rank 2 (pid 102 on host), in megatron/core" in text


def test_a_silent_rank_is_told_to_be_silent() -> None:
    _, _, text = told([at(COLLECTIVE), SILENT])
    assert text.startswith("training rank 1 (pid 101 on host) does not answer: the process is stopped")


def test_a_rank_whose_checkpoint_goes_to_the_disk_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stack that torch's own writer has then."""
    seen: list[Frame] = []

    def fsync(_: int) -> None:
        caller = traceback.extract_stack()[-2]
        seen.append(Frame(caller.filename, caller.lineno or 0, caller.name, caller.line or ""))

    monkeypatch.setattr(os, "fsync", fsync)
    dcp.save({"weight": torch.zeros(2)}, storage_writer=dcp.FileSystemWriter(tmp_path, thread_count=1), no_dist=True)
    assert seen
    assert all(flushes([STEP, frame]) for frame in seen)
    assert not flushes([STEP, WRITER])
    assert not flushes([])
