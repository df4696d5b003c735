"""The container engine on this machine, and its errors as sentences."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recipe.system.driver import LEAST_DRIVER
from recipe.system.errors import UserError

if TYPE_CHECKING:
    from docker import DockerClient

TIMEOUT_S = 600
"""For the engine's answer to one request: creating a container from a large image takes its time."""

_NO_RUNTIME = re.compile(r"could not select device driver|nvidia-container-runtime|unknown or invalid runtime name")
_OLD_DRIVER = re.compile(r"unsatisfied condition: cuda|driver.*(insufficient|too old|mismatch)", re.IGNORECASE)
_NO_DRIVER = re.compile(r"nvidia-container-cli|libnvidia-ml|nvml", re.IGNORECASE)


@contextmanager
def connect() -> "Iterator[DockerClient]":
    """A client of the engine that DOCKER_HOST names, or of the local one; its errors become UserErrors.

    Raises UserError if the docker package is missing or no engine answers.
    """
    try:
        import docker
        from docker.errors import APIError, DockerException
    except ImportError as error:
        raise UserError(
            "the docker package is not installed: run `make install` and use .venv/bin/invoke, or pip install docker"
        ) from error
    try:
        client = docker.from_env(timeout=TIMEOUT_S)
    except DockerException as error:
        raise UserError(_no_engine(str(error))) from error
    try:
        yield client
    except APIError as error:
        raise UserError(explain(str(error.explanation or error))) from error
    finally:
        client.close()


def _no_engine(message: str) -> str:
    if "Permission denied" in message or "PermissionError" in message:
        return "the container engine does not let this user in: add it to the group docker (usermod -aG docker NAME)"
    return (
        "no container engine answers (DOCKER_HOST or /var/run/docker.sock): install and start Docker, or run this "
        "inside the image"
    )


def explain(message: str) -> str:
    """An engine's error as a sentence: what is missing, and what to do."""
    if _NO_RUNTIME.search(message):
        return (
            "the container engine knows no NVIDIA runtime: install nvidia-container-toolkit, run `nvidia-ctk runtime "
            f"configure --runtime=docker` and restart Docker (it said: {message.strip()})"
        )
    if _OLD_DRIVER.search(message):
        return _driver_sentence("too old for the image", message)
    if _NO_DRIVER.search(message):
        return f"the NVIDIA runtime finds no working driver or GPU on this machine (it said: {message.strip()})"
    return f"the container engine refuses: {message.strip()}"


def check_gpus() -> None:
    """Raises UserError if this machine shows no GPU, or its driver is too old for the image's CUDA."""
    if shutil.which("nvidia-smi") is None:
        raise UserError(
            "there is no NVIDIA driver here (nvidia-smi is missing): the GPU targets need a machine with GPUs; "
            "`make train-tiny` runs without"
        )
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False)
    versions = answer.stdout.split()
    if answer.returncode != 0 or not versions:
        raise UserError(f"nvidia-smi finds no working GPU here: {(answer.stdout + answer.stderr).strip()}")
    if int(versions[0].split(".")[0]) < LEAST_DRIVER:
        raise UserError(_driver_sentence(f"{versions[0]}, too old for the image"))


def _driver_sentence(what: str, message: str = "") -> str:
    said = f" (the runtime said: {message.strip()})" if message else ""
    return f"the NVIDIA driver is {what}: CUDA 13 needs {LEAST_DRIVER} or newer; rent a node that has it{said}"
