"""The model that is evaluated: a directory or checkpoint behind an engine that is started here, or a running server."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from recipe.config.sglang_rules import find_sglang_python
from recipe.engines.launch import INITIAL_VERSION, Launch, SglangServer, launch_embedded, launch_sglang, sglang_python
from recipe.engines.process import EngineProcess
from recipe.system.errors import UserError
from recipe.system.json_text import read_json
from recipe.system.scratch import scratch_folder

EngineKind = Literal["auto", "sglang", "embedded"]

START_TIMEOUT_S = 1800.0


def context_length_of(directory: Path) -> int:
    """The longest context of the model in `directory`, in tokens. Raises UserError if its config.json does not say."""
    path = directory / "config.json"
    match read_json(path, dict[str, Any], "give --context-length").get("max_position_embeddings"):
        case int(length) if length > 0:
            return length
    raise UserError(f"{path} does not say max_position_embeddings: give --context-length")


def export_checkpoint(checkpoint: Path, origin: Path, target: Path) -> None:
    """Writes a torch_dist checkpoint as a Hugging Face directory, if it is not there. Raises UserError if it fails."""
    if target.exists():
        return
    command = [sys.executable, "-m", "recipe.conversion.export", "--load", str(checkpoint), "--save", str(target)]
    if subprocess.run([*command, "--hf-checkpoint", str(origin)], check=False).returncode:
        raise UserError(f"{checkpoint} could not be exported for the engine; the reason is above")


def engine_kind(kind: EngineKind) -> Literal["sglang", "embedded"]:
    """The one asked for; of auto, SGLang where it is installed."""
    if kind == "auto":
        return "embedded" if find_sglang_python(None) is None else "sglang"
    return kind


def engine_launch(kind: EngineKind, model: Path, arguments: Sequence[str], context_length: int, seed: int) -> Launch:
    """How the engine is started. Raises UserError if the one asked for is not installed."""
    threads = len(os.sched_getaffinity(0))
    if engine_kind(kind) == "sglang":
        server = SglangServer(sglang_python(None), () if torch.cuda.is_available() else None, tuple(arguments))
        return launch_sglang(
            model,
            server,
            weight_version=INITIAL_VERSION,
            threads=threads,
            context_length=context_length,
            random_seed=seed % 2**31,
        )
    launch = launch_embedded(
        model,
        weight_version=INITIAL_VERSION,
        threads=threads,
        context_length=context_length,
    )
    return Launch((*launch.arguments, *arguments), launch.environment)


@contextmanager
def running_engine(launch: Launch, log: Path) -> Iterator[str]:
    """Starts the engine and gives its address; ends it at the end. Raises UserError if it does not become healthy."""
    with scratch_folder(), EngineProcess(launch, log) as engine:
        engine.wait_healthy(START_TIMEOUT_S)
        yield engine.url
