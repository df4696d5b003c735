"""Checkpoints written while training goes on hold what a synchronous save would have held, or fail as loudly."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from trainer_support import on_ranks, random_checkpoint, random_samples, scheduled, tiny_config

from recipe.config import Config
from recipe.messages import Progress
from recipe.system.errors import UserError
from recipe.weights.checkpoints import PROGRESS, latest

pytestmark = pytest.mark.slow

IN_HOST = {
    "lr": 1e-3,
    "optimizer_cpu_offload": True,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "use_precision_aware_optimizer": True,
}


def async_config(ranks: int = 2, **checkpoint: int) -> Config:
    """Each rank holds half of the experts, and CPU Adam changes all tensors in place."""
    return tiny_config(
        random_checkpoint(),
        cluster={"actor_num_gpus_per_node": ranks, "device": "cpu"},
        perf={"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64, "expert_model_parallel_size": ranks},
        optimizer=IN_HOST,
        checkpoint={"async_save": True, **checkpoint},
    )


@contextmanager
def held_writer() -> Iterator[threading.Event]:
    """This rank's tensors are not written before the event is set."""
    from torch.distributed.checkpoint import FileSystemWriter

    may_write, write_data = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(*arguments):
        assert may_write.wait(600)
        return write_data(*arguments)

    FileSystemWriter.write_data = wait_and_write
    try:
        yield may_write
    finally:
        may_write.set()
        FileSystemWriter.write_data = write_data


def train(trainer, number: int) -> None:
    trainer.train_step(scheduled(trainer, random_samples(8, seed=number)))


def save_both_ways(trainer, synchronous: Path, asynchronous: Path) -> tuple[int, bool, int]:
    """The synchronous save, then the other, of which rank 1 writes its part only after two more steps. Returns the size
    of the copy, whether the checkpoint was in place before rank 1 had written, and the copy's size afterwards."""
    trainer.load()
    train(trainer, 0)
    in_flight, trainer.save_in_flight = trainer.save_in_flight, None
    trainer.save(synchronous, Progress(rollouts=1))
    trainer.save_in_flight = in_flight
    with held_writer() as may_write:
        trainer.save(asynchronous, Progress(rollouts=1))
        staged = in_flight.staged_bytes
        if trainer.is_first:
            may_write.set()
        for number in range(2):
            train(trainer, 1 + number)
        time.sleep(0.3)
        is_in_place = bool(list(asynchronous.glob("iter_*")))
        dist.barrier()
    trainer.finish_save()
    return staged, is_in_place, in_flight.staged_bytes


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing import load_plain_tensors

    return {name: value for name, value in load_plain_tensors(str(checkpoint)).items() if torch.is_tensor(value)}


def read_both(trainer, *checkpoints: Path) -> list[dict[str, torch.Tensor]]:
    return [tensors_of(checkpoint) for checkpoint in checkpoints]


def test_steps_taken_before_the_writing_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    folders = [tmp_path / "synchronous", tmp_path / "asynchronous"]
    checkpoints = [folder / "iter_0000001" for folder in folders]
    results = on_ranks(save_both_ways, async_config(), *folders)
    expected, found = on_ranks(read_both, async_config(1), *checkpoints)[0]
    assert found.keys() == expected.keys()
    assert len(found) > 200
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (checkpoints[1] / PROGRESS).read_text() == (checkpoints[0] / PROGRESS).read_text()
    assert {file.name for file in folders[1].rglob("*")} == {file.name for file in folders[0].rglob("*")}
    whole = sum(tensor.nbytes for tensor in expected.values())
    assert whole <= sum(staged for staged, _, _ in results) < 1.1 * whole
    assert [(was_in_place, held) for _, was_in_place, held in results] == [(False, 0)] * 2


def saves_in_a_row(trainer, folder: Path) -> tuple[list[str], str | None]:
    """The second waits for the first; no checkpoint goes for the third."""
    trainer.load()
    with held_writer() as may_write:
        trainer.save(folder, Progress(rollouts=1))
        threading.Timer(0.3, may_write.set).start()
        trainer.save(folder, Progress(rollouts=2))
    trainer.save(folder, Progress(rollouts=3), beside_others=True)
    trainer.finish_save()
    return sorted(path.name for path in folder.iterdir()), (newest := latest(folder)) and newest.name


def failing_saves(trainer, folder: Path) -> tuple[list[str], bool, str]:
    """Rank 1's disk is full, at the end of a run and before another save; then rank 0 cannot end what all wrote."""
    trainer.load()
    trainer.save(folder, Progress(rollouts=1))
    trainer.finish_save()
    largest, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not trainer.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    told = []

    def save_and_fail(rollouts: int, end) -> None:
        trainer.save(folder, Progress(rollouts=rollouts))
        train(trainer, rollouts)
        try:
            end()
        except UserError as error:
            told.append(str(error))

    def save_where_there_is_room() -> None:
        trainer.save_in_flight.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        trainer.save(folder, Progress(rollouts=4))

    save_and_fail(2, trainer.finish_save)
    unharmed = latest(folder).name == "iter_0000001"
    save_and_fail(3, save_where_there_is_room)
    trainer.finish_save()
    dist.barrier()
    newest = latest(folder)
    if trainer.is_first:
        (folder / "latest_checkpointed_iteration.txt").unlink()
        (folder / "latest_checkpointed_iteration.txt").mkdir()
    save_and_fail(5, trainer.finish_save)
    trainer.finish_save()
    return told, unharmed, newest.name


def test_a_save_waits_for_the_one_before_and_old_ones_go(tmp_path: Path) -> None:
    for names, newest in on_ranks(saves_in_a_row, async_config(save_keep=1), tmp_path):
        assert names == ["iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt", "written.json"]
        assert newest == "iter_0000003"


def test_a_failure_is_told_on_every_rank_and_spares_the_last_good_checkpoint(tmp_path: Path) -> None:
    for told, unharmed, newest in on_ranks(failing_saves, async_config(), tmp_path):
        assert [sentence.split(" cannot")[0] for sentence in told] == [
            f"the checkpoint of rollout {rollouts}" for rollouts in (2, 3, 5)
        ]
        assert all("the last good checkpoint is whole" in sentence for sentence in told)
        assert unharmed
        assert newest == "iter_0000004", "the save after a failed one is written"


def killed_while_writing(trainer, folder: Path) -> None:
    trainer.load()
    trainer.save(folder, Progress(rollouts=1))
    trainer.finish_save()
    with held_writer():
        trainer.save(folder, Progress(rollouts=2))
        while not (folder / ".iter_0000002.partial").exists():
            time.sleep(0.01)
        train(trainer, 2)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        on_ranks(killed_while_writing, async_config(1), tmp_path)
    assert (tmp_path / ".iter_0000002.partial").exists()
    assert latest(tmp_path) == tmp_path / "iter_0000001"
    [(names, newest)] = on_ranks(saves_in_a_row, async_config(1), tmp_path)
    assert names[:3] == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert names[3:] == ["latest_checkpointed_iteration.txt", "written.json"]
    assert newest == "iter_0000003"
