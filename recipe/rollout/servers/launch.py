"""How the two kinds of server are started."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipe.config import Config, RolloutConfig
from recipe.config.sglang_rules import EngineLayout, find_sglang_python
from recipe.errors import UserError

SERVE_ON_CPU = Path(__file__).parent / "sglang_cpu" / "serve.py"
"""Starts SGLang where there is no GPU; it is run by path, in SGLang's own environment."""

CPU_RUNNING_REQUESTS = 128
"""Sequences that SGLang generates at once on a CPU."""
CPU_CACHE_TOKENS = 1 << 18
"""Largest cache there, which SGLang would else size by the machine's whole memory."""


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
    config: Config,
    *,
    on_gpus: bool,
    weight_version: str,
    threads: int,
    context_length: int,
    random_seed: int = 0,
) -> Launch:
    """SGLang with the user's `--sglang-*` arguments after ours, which so have the last word.

    It computes in the trainer's precision and keeps its tokenizer: stop strings need one, and both engines answer with
    text. Raises UserError if SGLang is installed nowhere.
    """
    arguments = [
        *("--model-path", str(model_path)),
        *("--weight-version", weight_version),
        *("--random-seed", str(random_seed)),
        *("--dtype", "bfloat16" if config.model.bf16 else "float32"),
        *("--context-length", str(context_length)),
        *("--tp-size", str(EngineLayout.of(config).tp)),
    ]
    python = str(sglang_python(config.rollout))
    if on_gpus:
        saver = ["--enable-memory-saver"] if config.cluster.colocate else []
        return Launch((python, "-m", "sglang.launch_server", *arguments, *saver, *config.sglang.command_line()))
    tokens = min(CPU_RUNNING_REQUESTS * context_length, CPU_CACHE_TOKENS)
    arguments += [
        *("--device", "cpu"),
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        *("--max-running-requests", str(CPU_RUNNING_REQUESTS)),
        *("--max-total-tokens", str(tokens)),
        "--disable-overlap-schedule",
        "--disable-cuda-graph",
    ]
    return Launch(
        (python, str(SERVE_ON_CPU), *arguments, *config.sglang.command_line()),
        {"OMP_NUM_THREADS": str(threads)},
    )


def sglang_python(rollout: RolloutConfig) -> Path:
    """The interpreter that SGLang is installed in. Raises UserError if there is none."""
    python = find_sglang_python(rollout)
    if python is None:
        raise UserError(
            "SGLang is not installed: `make install-sglang` puts it, for CPUs, into .venv-sglang; name the interpreter "
            "of an environment that has it with --rollout-engine-python, or use --rollout-engine embedded"
        )
    return python
