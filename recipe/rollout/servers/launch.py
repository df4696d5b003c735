"""How the two kinds of server are started."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from recipe.config import Config
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


@dataclass(frozen=True, slots=True)
class SglangServer:
    """What one server of SGLang's is."""

    python: Path
    """The interpreter that it is installed in."""
    on_gpus: bool
    arguments: tuple[str, ...] = ()
    """The user's own, which have the last word."""
    dtype: str = "auto"
    tp_size: int = 1
    first_gpu: int = 0
    """Its first one among the machine's."""
    releases_memory: bool = False
    """Whether its GPUs are a trainer's too."""

    @classmethod
    def of(cls, config: Config, on_gpus: bool, *, first_gpu: int = 0) -> Self:
        """An engine of a run, in the trainer's precision. Raises UserError if SGLang is installed nowhere."""
        return cls(
            python=sglang_python(config.rollout.rollout_engine_python),
            on_gpus=on_gpus,
            arguments=tuple(config.sglang.command_line()),
            dtype="bfloat16" if config.model.bf16 else "float32",
            tp_size=EngineLayout.of(config).tp,
            first_gpu=first_gpu,
            releases_memory=config.cluster.colocate,
        )


def launch_sglang(
    model_path: Path,
    server: SglangServer,
    *,
    weight_version: str,
    threads: int,
    context_length: int,
    random_seed: int = 0,
) -> Launch:
    """SGLang. It keeps its tokenizer: stop strings need one, and both engines answer with text."""
    arguments = [
        *("--model-path", str(model_path)),
        *("--weight-version", weight_version),
        *("--random-seed", str(random_seed)),
        *("--dtype", server.dtype),
        *("--context-length", str(context_length)),
        *("--tp-size", str(server.tp_size)),
    ]
    python = str(server.python)
    if server.on_gpus:
        arguments += ["--base-gpu-id", str(server.first_gpu)]
        saver = ["--enable-memory-saver"] if server.releases_memory else []
        return Launch((python, "-m", "sglang.launch_server", *arguments, *saver, *server.arguments))
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
        (python, str(SERVE_ON_CPU), *arguments, *server.arguments),
        {"OMP_NUM_THREADS": str(threads)},
    )


def sglang_python(named: Path | None) -> Path:
    """The interpreter that SGLang is installed in, see `find_sglang_python`. Raises UserError if there is none."""
    python = find_sglang_python(named)
    if python is None:
        raise UserError(
            "SGLang is not installed: `make install-sglang` puts it, for CPUs, into .venv-sglang; name the interpreter "
            "of an environment that has it with --rollout-engine-python, or use --rollout-engine embedded"
        )
    return python
