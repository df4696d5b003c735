"""Which weights are evaluated: a directory of samples is never continued with others."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.engines.launch import INITIAL_VERSION
from recipe.sampling.errors import EngineAnswerError, EngineRefused
from recipe.sampling.http import ask_blocking, succeeds
from recipe.system.errors import UserError
from recipe.system.files import sha256_file
from recipe.system.json_text import parse_json

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_RECORDS = frozenset(["download.json", "manifest.json"])
"""They tell where a model came from, and may differ between copies."""
_SERVED = (
    "version",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "revision",
    "lora_paths",
    "json_model_override_args",
    "speculative_algorithm",
)
"""What of a server's /server_info bears on its answers."""
_WORTH_SAYING = 4 << 30
_HEALTH_TIMEOUT_S, _ANSWER_TIMEOUT_S = 5.0, 600.0


@dataclass(frozen=True)
class Identity:
    """Which weights answer."""

    name: str
    sha256: str
    """See `evaluation.result.Settings.model_sha256`."""
    version: str
    """Weight version of every token."""


def identity_of_directory(directory: Path) -> Identity:
    """Identity of a Hugging Face directory. Raises UserError if it has no config.json or no weights."""
    if not _holds_model(directory):
        raise UserError(f"{directory} is no Hugging Face checkpoint: it has no config.json or no *.safetensors")
    return Identity(str(directory), _sha256(_model_files(directory)), INITIAL_VERSION)


def newest_checkpoint(directory: Path) -> Path:
    """The torch_dist directory itself, or the newest of training checkpoints. Raises UserError if there is none."""
    from recipe.weights.checkpoints import METADATA, latest

    checkpoint = latest(directory) or directory
    if not (checkpoint / METADATA).is_file():
        raise UserError(f"{directory} is no torch_dist checkpoint: it has no {METADATA}")
    return checkpoint


def identity_of_checkpoint(checkpoint: Path, origin: Path) -> Identity:
    """Identity of one torch_dist directory, with the configuration and tokenizer of `origin`."""
    files = [file for file in checkpoint.iterdir() if file.is_file()]
    settings = [file for file in _model_files(origin) if file.suffix != ".safetensors"]
    return Identity(str(checkpoint), _sha256([*files, *settings]), INITIAL_VERSION)


def origin_of(checkpoint: Path) -> Path:
    """The model that a training run began with, as the manifest of the run that the checkpoint lies in has it. Raises
    UserError if there is none."""
    for folder in [checkpoint, *checkpoint.absolute().parents][:4]:
        try:
            manifest = parse_json((folder / "manifest.json").read_bytes())
            return Path(manifest["config"]["model"]["hf_checkpoint"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(
        f"no run's manifest.json lies above {checkpoint}: give --hf-checkpoint, the model that training started from"
    )


def identity_of_server(url: str) -> tuple[Identity, Path | None]:
    """Identity of the server at `url`, and the directory of its tokenizer if that is on this machine. Raises UserError
    if it does not answer or does not say what it serves."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url} has no http:// before it: give http://{url}")
    base = url.rstrip("/")
    health = base + "/health_generate"
    if not succeeds("GET", health, timeout_s=_HEALTH_TIMEOUT_S):
        raise UserError(f"no server answers at {health}: start one there, or give --model instead of --url")
    info = _said_at(base + "/model_info")
    try:
        settings = _said_at(base + "/server_info")
    except (EngineRefused, EngineAnswerError):
        settings = {}
    try:
        model, version = str(info["model_path"]), str(info["weight_version"])
    except KeyError as error:
        raise UserError(f"the server at {url} is no SGLang server: its /model_info has no {error}") from error
    said = {"model_info": info, "server_info": {name: settings.get(name) for name in _SERVED}}
    if _holds_model(Path(model)):
        said["files"] = {"sha256": _sha256(_model_files(Path(model)))}
    tokenizer = Path(str(info.get("tokenizer_path") or model))
    sha256 = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    identity = Identity(f"{model} (version {version})", sha256, version)
    return identity, tokenizer if (tokenizer / "tokenizer.json").is_file() else None


def _said_at(address: str) -> Mapping[str, Any]:
    answer = ask_blocking("GET", address, timeout_s=_ANSWER_TIMEOUT_S)
    if not isinstance(answer, dict):
        raise EngineAnswerError(f"{address} did not answer with a JSON object: it is no SGLang server")
    return answer


def _holds_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _model_files(directory: Path) -> list[Path]:
    found = {file for pattern in _MODEL_FILES for file in directory.glob(pattern) if file.is_file()}
    return [file for file in found if file.name not in _RECORDS]


def _sha256(files: Sequence[Path]) -> str:
    """Digest of the names and contents, read by several threads at once."""
    files = sorted(files, key=lambda file: (file.name, str(file)))
    size = sum(file.stat().st_size for file in files)
    if size > _WORTH_SAYING:
        print(f"reading the model's {size / 1e9:,.0f} GB, to know it again", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        hashes = list(threads.map(sha256_file, files))
    lines = (f"{file.name}\0{sha256}\n" for file, sha256 in zip(files, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
