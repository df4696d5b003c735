"""Weights cross by shared memory, as one segment, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from rollout_support import shared_segments

from recipe.weight_sync.tensor import Bucket, PayloadError, read_payload

WEIGHTS = [("a", torch.randn(7, 3)), ("b", torch.randn(5).bfloat16()), ("c", torch.arange(3)), ("d", torch.tensor(2.0))]

READER = """
import sys
from recipe.weight_sync.tensor import read_payload
weights = read_payload(sys.stdin.readline().strip())
print([(name, tensor.double().sum().item()) for name, tensor in weights], flush=True)
del weights
"""
STUCK_READER = READER.replace("del weights", "sys.stdin.readline()")
WRITER = """
import torch, time
from recipe.weight_sync.tensor import Bucket
bucket = Bucket.of([("a", torch.ones(1000))])
print(bucket.payload(), flush=True)
time.sleep(600)
"""


def _becomes_true(holds: Callable[[], bool]) -> bool:
    """Whether it does within the time that torch's watcher takes to notice."""
    deadline = time.monotonic() + 120
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_staged_tensors_are_equal_and_one_segment() -> None:
    before = shared_segments(os.getpid())
    staged = Bucket.of(WEIGHTS)
    assert len(shared_segments(os.getpid()) - before) == 1
    assert [name for name, _ in staged.weights] == [name for name, _ in WEIGHTS]
    assert all(torch.equal(view, tensor) for (_, view), (_, tensor) in zip(staged.weights, WEIGHTS, strict=True))


def test_a_reader_in_another_process_sees_them_and_the_segment_goes() -> None:
    before = shared_segments(os.getpid())
    staged = Bucket.of(WEIGHTS)
    payload = staged.payload()
    reader = subprocess.run(
        [sys.executable, "-c", READER], input=payload + "\n", text=True, capture_output=True, check=True
    )
    assert reader.stdout.strip() == str([(name, tensor.double().sum().item()) for name, tensor in WEIGHTS])
    del staged
    assert shared_segments(os.getpid()) == before


@pytest.mark.parametrize("first_victim", ["writer", "reader"])
def test_two_killed_sides_leave_nothing(first_victim: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    payload = writer.stdout.readline()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    reader = subprocess.Popen([sys.executable, "-c", STUCK_READER], text=True, **pipes)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(payload)
    reader.stdin.flush()
    assert "1000.0" in reader.stdout.readline()
    assert len(shared_segments(writer.pid)) == 1
    for process in (writer, reader) if first_victim == "writer" else (reader, writer):
        process.send_signal(signal.SIGKILL)
        process.wait()
    for pipe in (writer.stdout, reader.stdin, reader.stdout):
        pipe.close()
    assert _becomes_true(lambda: not shared_segments(writer.pid))
    assert _becomes_true(lambda: not _watchers_of(writer.pid))


def _watchers_of(pid: int) -> list[str]:
    """torch's watcher processes that `pid` had started."""
    table = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if "torch_shm_manager" in line and line.split()[0] == str(pid)]


def test_what_is_no_payload_is_an_error() -> None:
    with pytest.raises(PayloadError):
        read_payload("AAAA")
