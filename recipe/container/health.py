"""The image's health check: python -m recipe.container.health.

Healthy is a container whose packages are those of its lock, whose GPUs (if it was given any) all answer, and whose
shared memory has room. A GPU that has fallen off its bus shows here before a collective operation hangs on it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from recipe.container.provenance import LOCK, read_provenance
from recipe.system.files import sha256_file

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY_BYTES = 16 << 20
GPU_TIMEOUT_S = 20


def problems() -> Iterator[str]:
    """A sentence for everything that is wrong."""
    try:
        if read_provenance()["lock_sha256"] != sha256_file(LOCK):
            yield f"{LOCK} is not the lock that this image was built from"
    except (OSError, ValueError, KeyError) as error:
        yield f"the image's provenance cannot be read: {error}"
    if shutil.disk_usage(SHARED_MEMORY).free < LEAST_SHARED_MEMORY_BYTES:
        yield f"{SHARED_MEMORY} is full"
    if os.environ.get("NVIDIA_VISIBLE_DEVICES", "void") not in ("", "void", "none"):
        yield from _gpu_problems()


def _gpu_problems() -> Iterator[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return  # asked for by the base image's environment, not by whoever started the container
    except subprocess.TimeoutExpired:
        yield f"nvidia-smi did not answer in {GPU_TIMEOUT_S} s"
        return
    if answer.returncode != 0:
        yield f"the GPUs do not answer: {(answer.stdout + answer.stderr).strip()}"


def main() -> None:
    found = list(problems())
    print("\n".join(found) or "healthy")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
