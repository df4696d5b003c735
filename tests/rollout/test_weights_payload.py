"""Weights cross by shared memory, as one segment, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipe.rollout.weights_payload import PayloadError, deserialize_named_tensors, serialize_named_tensors, stage

SHARED_MEMORY = Path("/dev/shm")
WEIGHTS = [("a", torch.randn(7, 3)), ("b", torch.randn(5).bfloat16()), ("c", torch.arange(3)), ("d", torch.tensor(2.0))]

READER = """
import sys
from recipe.rollout.weights_payload import deserialize_named_tensors
weights = deserialize_named_tensors(sys.stdin.readline().strip())
print([(name, tensor.double().sum().item()) for name, tensor in weights], flush=True)
sys.stdin.readline()
"""
WRITER = """
import torch, time
from recipe.rollout.weights_payload import serialize_named_tensors, stage
weights = stage([("a", torch.ones(1000))])
print(serialize_named_tensors(weights), flush=True)
time.sleep(60)
"""


def _segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith("torch_")}


def _gone(segments: set[str]) -> bool:
    """Whether the segments go within the time torch's watcher takes to notice."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not segments & _segments():
            return True
        time.sleep(0.1)
    return False


def test_staged_tensors_are_equal_and_one_segment() -> None:
    before = _segments()
    staged = stage(WEIGHTS)
    assert [name for name, _ in staged] == [name for name, _ in WEIGHTS]
    assert all(torch.equal(view, tensor) for (_, view), (_, tensor) in zip(staged, WEIGHTS, strict=True))
    serialize_named_tensors(staged)
    assert len(_segments() - before) == 1


def test_a_reader_in_another_process_sees_them_and_the_segment_goes() -> None:
    before = _segments()
    staged = stage(WEIGHTS)
    payload = serialize_named_tensors(staged)
    reader = subprocess.run(
        [sys.executable, "-c", READER], input=payload + "\n", text=True, capture_output=True, check=True
    )
    assert reader.stdout.strip() == str([(name, tensor.double().sum().item()) for name, tensor in WEIGHTS])
    del staged
    assert _segments() == before


@pytest.mark.parametrize("victim", ["writer", "reader"])
def test_a_killed_side_leaves_nothing(victim: str) -> None:
    before = _segments()
    writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    payload = writer.stdout.readline()
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write(payload)
    reader.stdin.flush()
    assert "1000.0" in reader.stdout.readline()
    used = _segments() - before
    assert len(used) == 1
    first, second = (writer, reader) if victim == "writer" else (reader, writer)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second.kill()
    second.wait()
    for pipe in (writer.stdout, reader.stdin, reader.stdout):
        pipe.close()
    assert _gone(used)
    assert not _watchers_of(writer.pid)


def _watchers_of(pid: int) -> list[str]:
    """torch's watcher processes that `pid` had started."""
    table = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in table.splitlines() if "torch_shm_manager" in line and line.split()[0] == str(pid)]


def test_what_is_no_payload_is_an_error() -> None:
    with pytest.raises(PayloadError):
        deserialize_named_tensors("AAAA")
    assert os.environ
