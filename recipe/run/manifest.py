"""Where a run came from: everything needed to repeat it, and nothing secret."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from recipe.config import Config, Resolved
from recipe.container.provenance import inside_image, read_provenance
from recipe.system.files import atomic_write_text, sha256_file
from recipe.system.json_text import read_json

_SECRET = re.compile(r"api_key|auth_token|access_token|secret|password|passwd|credential")
_CHECKPOINT_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_SINGLE_SHARD = "model.safetensors"


def write_manifest(path: Path, resolved: Resolved) -> None:
    """Writes the manifest: configuration, where each value came from and what flags replaced, seed, versions, git
    commit, the image's provenance, hashes of the inputs. A run that goes on keeps the manifests of its earlier commands
    under `earlier`, oldest first.

    The environment is not recorded, and values whose name says that they are secret are masked.
    """
    config = resolved.config
    manifest: dict[str, Any] = {
        "name": config.misc.name,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": public_config(config),
        "checkpoints": str(config.save_dir.absolute()),
        "sources": dict(resolved.sources),
        "recipe": resolved.recipe,
        "instead_of": _mask(dict(resolved.instead_of)),
        "notes": list(resolved.notes),
        "seed": config.misc.seed,
        "versions": _versions(),
        "git": _git(Path(__file__).parent),
        "image": read_provenance() if inside_image() else None,
        "sha256": _hashes(config),
        "earlier": [],
    }
    if path.exists():
        last = read_json(path, dict[str, Any], "restore it, or remove it")
        manifest["earlier"] = [*last.pop("earlier", ()), last]
    atomic_write_text(path, json.dumps(manifest, indent=1) + "\n")


def public_config(config: Config) -> dict[str, Any]:
    """The configuration as JSON values, secrets masked."""
    return _mask(config.model_dump(mode="json"))


def _mask(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _masked(name, value) for name, value in values.items()}


def _masked(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _mask(value)
    return "***" if value is not None and _SECRET.search(name) else value


def _versions() -> dict[str, Any]:
    packages = {package.metadata["Name"]: package.version for package in distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a repository with a commit, or without git."""
    try:
        commit = _ask_git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_ask_git(folder, "status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _ask_git(folder: Path, *words: str) -> str:
    answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def _hashes(config: Config) -> dict[str, str]:
    checkpoint = config.model.hf_checkpoint
    files = [checkpoint / name for name in _CHECKPOINT_FILES]
    if not (checkpoint / "model.safetensors.index.json").exists():
        files.append(checkpoint / _SINGLE_SHARD)
    files += [data.path for data in config.data.prompt_data]
    files += [data.path for data in config.eval.eval_prompt_data]
    return {str(path): sha256_file(path) for path in files if path.is_file()}
