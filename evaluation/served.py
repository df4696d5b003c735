"""The model that is evaluated: a directory or checkpoint behind an engine that is started here, or a running server."""

import asyncio
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recipe.config.sglang_rules import find_sglang_python
from recipe.errors import UserError
from recipe.rollout.client import RolloutClient
from recipe.rollout.servers.launch import Launch, SglangServer, launch_embedded, launch_sglang, sglang_python
from recipe.rollout.servers.process import EngineProcess

EngineKind = Literal["auto", "sglang", "embedded"]

INITIAL_VERSION = "initial"
"""Of the weights of an engine that is started here."""
START_TIMEOUT_S = 1800.0
_ENDS = 1 << 20


@dataclass(frozen=True)
class Identity:
    """Which weights answer."""

    name: str
    sha256: str
    """See `evaluation.result.Settings.model_sha256`."""
    version: str
    """Weight version of every token."""


def identity_of_directory(directory: Path) -> Identity:
    """Of a Hugging Face directory. Raises UserError if it has no config.json or no weights."""
    weights = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").is_file() or not weights:
        raise UserError(f"{directory} is no Hugging Face checkpoint: it has no config.json or no *.safetensors")
    return Identity(str(directory), _fingerprint([directory / "config.json", *weights]), INITIAL_VERSION)


def identity_of_checkpoint(directory: Path) -> Identity:
    """Of a torch_dist directory, or the newest of training checkpoints. Raises UserError if there is none."""
    from recipe.weights.torch_dist import latest

    checkpoint = latest(directory) or directory
    if not (checkpoint / ".metadata").is_file():
        raise UserError(f"{directory} is no torch_dist checkpoint: it has no .metadata")
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    return Identity(str(checkpoint), _fingerprint(files), INITIAL_VERSION)


def _fingerprint(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            found.update(content.read(2 * _ENDS))
            content.seek(max(0, size - _ENDS))
            found.update(content.read())
    return found.hexdigest()


def identity_of_server(url: str) -> tuple[Identity, Path | None]:
    """Of the server at `url`, and the directory of its tokenizer if that is on this machine. Raises UserError if it
    does not answer or does not say what it serves."""
    info = asyncio.run(_model_info(url))
    try:
        model, version = str(info["model_path"]), str(info["weight_version"])
    except KeyError as error:
        raise UserError(f"the server at {url} is no SGLang server: its /model_info has no {error}") from error
    said = json.dumps({"model_path": model, "weight_version": version}, sort_keys=True)
    tokenizer = Path(str(info.get("tokenizer_path") or model))
    identity = Identity(f"{model} (version {version})", hashlib.sha256(said.encode()).hexdigest(), version)
    return identity, tokenizer if (tokenizer / "tokenizer.json").is_file() else None


async def _model_info(url: str) -> dict[str, Any]:
    async with RolloutClient([url]) as client:
        if not all(await client.healthy()):
            raise UserError(f"no server answers at {url}/health: start one there, or give --model instead of --url")
        [info] = await client.model_info()
    return info


def context_length_of(directory: Path) -> int:
    """The longest context of the model in `directory`, in tokens. Raises UserError if its config.json does not say."""
    try:
        return int(json.loads((directory / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory / 'config.json'} does not say max_position_embeddings: give --context-length"
        ) from (error)


def export_checkpoint(checkpoint: Path, origin: Path, target: Path) -> None:
    """Writes a torch_dist checkpoint as a Hugging Face directory, if it is not there. Raises UserError if it fails."""
    if target.exists():
        return
    command = [sys.executable, "-m", "recipe.weights.export", "--load", str(checkpoint), "--save", str(target)]
    if subprocess.run([*command, "--hf-checkpoint", str(origin)], check=False).returncode:
        raise UserError(f"{checkpoint} could not be exported for the engine; the reason is above")


def engine_launch(kind: EngineKind, model: Path, arguments: str, context_length: int, seed: int) -> Launch:
    """How the engine is started; auto: SGLang where it is installed. Raises UserError if the one asked for is not."""
    if kind == "auto":
        kind = "embedded" if find_sglang_python(None) is None else "sglang"
    threads, seed = len(os.sched_getaffinity(0)), seed % 2**31
    if kind == "sglang":
        server = SglangServer(
            sglang_python(None), () if torch.cuda.is_available() else None, tuple(shlex.split(arguments))
        )
        return launch_sglang(
            model,
            server,
            weight_version=INITIAL_VERSION,
            threads=threads,
            context_length=context_length,
            random_seed=seed,
        )
    launch = launch_embedded(
        model,
        weight_version=INITIAL_VERSION,
        threads=threads,
        context_length=context_length,
        random_seed=seed,
    )
    return Launch((*launch.arguments, *shlex.split(arguments)), launch.environment)


@contextmanager
def running_engine(launch: Launch, log: Path) -> Iterator[str]:
    """Starts the engine and gives its address; ends it at the end. Raises UserError if it does not become healthy."""
    with EngineProcess(launch, log) as engine:
        engine.wait_healthy(START_TIMEOUT_S)
        yield engine.url
