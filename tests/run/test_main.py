"""How commands end."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from recipe.system.errors import run_main

def main():
    print("ready", flush=True)
    try:
        while True:  # signal.pause would miss one that comes just before it
            time.sleep(0.05)
    except SystemExit:
        sys.exit(1)  # as Ray does when it is interrupted where it waits

run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_its_status_whatever_ray_makes_of_it(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"stopping: {number.name} received\n"


def test_a_signal_that_the_parent_has_blocked_is_heeded() -> None:
    """As for a job of Ray's, whose processes block SIGINT."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopping: SIGINT received\n")


def test_a_full_disk_under_the_output_is_told_in_a_sentence() -> None:
    program = "from recipe.system.errors import run_main; run_main(lambda: print('x' * 100_000))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: the disk is full: where the output goes could not be written; free space there\n"
