"""Signals to a run, and to each of its processes: nothing stays behind, and the last checkpoint is whole."""

import json
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_support import (
    TinyInputs,
    arguments,
    family,
    finish,
    leaves_no_process,
    metrics,
    run,
    samples,
    start,
    wait_for_step,
    wait_until,
)
from torch.distributed.checkpoint import FileSystemReader

from recipe.notice import SAVED_STATUS
from recipe.weights.torch_dist import latest

pytestmark = pytest.mark.slow

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def leaves_nothing(marker: str) -> Iterator[set[int]]:
    """Afterwards no process of the run lives, nobody listens on the ports put into the set, and /dev/shm holds no more
    than before."""
    before = set(SHARED_MEMORY.iterdir())
    ports: set[int] = set()
    with leaves_no_process(marker):
        yield ports
    wait_until(lambda: ports.isdisjoint(listening_ports(psutil.net_connections(kind="tcp"))), 30)
    assert {path for path in SHARED_MEMORY.iterdir() if path not in before} == set()


def listening_ports(connections: Iterable[Any]) -> set[int]:
    """Ports that are listened on, of psutil's `connections`."""
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def ports_of(processes: list[psutil.Process]) -> set[int]:
    """Ports that the processes listen on."""
    return listening_ports(one for process in processes for one in process.net_connections(kind="tcp"))


def test_a_notice_saves_and_the_run_goes_on_as_if_it_had_never_come(
    inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    command = arguments(inputs, tmp_path, "noticed", "--save-interval", "1000")
    with leaves_nothing(str(tmp_path)) as ports:
        process = start([*command, "--custom-rm-path", "run_support:slow_reward"])
        wait_for_step(process, tmp_path / "noticed", 1)
        ports |= ports_of(family(process))
        process.send_signal(signal.SIGTERM)
        status, output = finish(process, 90)
    assert status == SAVED_STATUS, output
    assert "SIGTERM received: saving what is done" in output
    assert "Traceback" not in output
    summary = json.loads((tmp_path / "noticed" / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"
    newest = latest(tmp_path / "noticed" / "checkpoints")
    assert newest is not None
    assert int(newest.name.removeprefix("iter_")) in (1, 2), "it was to end in mid rollout"
    status, output = run([*command, "--load", str(tmp_path / "noticed" / "checkpoints")])
    assert status == 0, output
    assert metrics(tmp_path / "noticed") == metrics(uninterrupted)
    assert samples(tmp_path / "noticed") == samples(uninterrupted)


VICTIMS = {
    "rank": "ray::RankActor",
    "raylet": "raylet/raylet",
}
"""Kinds of process of a run, by what their command line has. `test_runs` kills an engine, its owner and the run."""


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_that_loses_a_process_leaves_nothing_behind_and_its_checkpoint_is_whole(
    victim: str, inputs: TinyInputs, tmp_path: Path
) -> None:
    directory = tmp_path / "struck"
    command = arguments(inputs, tmp_path, "struck", "--num-rollout", "1000", "--save-interval", "1", "--save-keep", "2")
    with leaves_nothing(str(tmp_path)) as ports:
        process = start(command)
        wait_for_step(process, directory, 2)
        processes = family(process)
        ports |= ports_of(processes)
        next(p for p in processes if VICTIMS[victim] in " ".join(p.cmdline())).kill()
        status, output = finish(process, 120)
    assert status != 0
    assert "Traceback" not in output, output
    newest = latest(directory / "checkpoints")
    assert newest is not None
    assert_whole(newest)


def assert_whole(checkpoint: Path) -> None:
    """Every piece that the checkpoint's index names lies within its file."""
    pieces = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    assert pieces
    for piece in pieces:
        assert piece.offset + piece.length <= (checkpoint / piece.relative_path).stat().st_size
