"""How the two kinds of server are started."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipe.config import SglangConfig


@dataclass(frozen=True, slots=True)
class Launch:
    """A server's command line but for its address, and what its environment has besides ours."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def launch_embedded(
    model_path: Path,
    *,
    weight_version: str,
    threads: int,
    context_length: int | None = None,
    max_running_requests: int = 256,
    random_seed: int = 0,
) -> Launch:
    """The embedded engine, for machines without a GPU."""
    arguments = [
        *(sys.executable, "-m", "recipe.rollout.servers.embedded"),
        *("--model-path", str(model_path)),
        *("--weight-version", weight_version),
        *("--threads", str(threads)),
        *("--max-running-requests", str(max_running_requests)),
        *("--random-seed", str(random_seed)),
    ]
    if context_length is not None:
        arguments += ["--context-length", str(context_length)]
    return Launch(tuple(arguments), {"OMP_NUM_THREADS": str(threads)})


def launch_sglang(
    model_path: Path,
    sglang: SglangConfig,
    *,
    weight_version: str,
    context_length: int | None = None,
    random_seed: int = 0,
) -> Launch:
    """SGLang, installed beside this program, with the user's `--sglang-*` arguments after ours."""
    arguments = [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model_path)),
        *("--weight-version", weight_version),
        *("--random-seed", str(random_seed)),
    ]
    if context_length is not None:
        arguments += ["--context-length", str(context_length)]
    return Launch((*arguments, *sglang.command_line()))
