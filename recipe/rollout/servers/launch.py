"""How the two kinds of server are started."""

import math
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

RENDEZVOUS = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""Where SGLang's processes meet; by default at a port that is open on every address, whatever its --host says."""

CPU_RUNNING_REQUESTS = 128
"""Sequences that SGLang generates at once on a CPU."""
CPU_CACHE_TOKENS = 1 << 18
"""Largest cache there, which SGLang would else size by the machine's whole memory."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A server's command line but for its address, and what its environment has besides ours."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    rendezvous: str | None = None
    """The variable that names, as a URL, a file in which the server's own processes meet."""


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
    releases_memory: bool = False
    """Whether its GPUs are a trainer's too."""
    health_timeout_s: float = 20.0
    """After so long without a token /health_generate tells that it does not generate."""

    @classmethod
    def of(cls, config: Config, on_gpus: bool) -> Self:
        """An engine of a run, in the trainer's precision. Raises UserError if SGLang is installed nowhere."""
        return cls(
            python=sglang_python(config.rollout.rollout_engine_python),
            on_gpus=on_gpus,
            arguments=tuple(config.sglang.command_line()),
            dtype="bfloat16" if config.model.bf16 else "float32",
            tp_size=EngineLayout.of(config).tp,
            releases_memory=config.cluster.colocate,
            health_timeout_s=config.rollout.rollout_health_check_timeout,
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
    # An engine's processes are on one machine: they need no door to others.
    environment = {
        "SGLANG_HEALTH_CHECK_TIMEOUT": str(math.ceil(server.health_timeout_s)),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if server.on_gpus:
        saver = ["--enable-memory-saver"] if server.releases_memory else []
        words = (python, "-m", "sglang.launch_server", *arguments, *saver, *server.arguments)
        return Launch(words, environment, RENDEZVOUS)
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
    environment["OMP_NUM_THREADS"] = str(threads)
    return Launch((python, str(SERVE_ON_CPU), *arguments, *server.arguments), environment, RENDEZVOUS)


def sglang_python(named: Path | None) -> Path:
    """The interpreter that SGLang is installed in, see `find_sglang_python`. Raises UserError if there is none."""
    python = find_sglang_python(named)
    if python is None:
        raise UserError(
            "SGLang is not installed: `make install-sglang` puts it, for CPUs, into .venv-sglang; name the interpreter "
            "of an environment that has it with --rollout-engine-python, or use --rollout-engine embedded"
        )
    return python
