"""How the two kinds of server are started."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from recipe.config import Config, SglangConfig
from recipe.config.sglang_rules import EngineLayout, find_sglang_python
from recipe.config.speculation_rules import DEFAULT_DRAFT_STEPS
from recipe.system.cuda_allocator import without_expandable_segments
from recipe.system.errors import UserError
from recipe.system.ports import DERIVED_FROM_PORT

SERVE = Path(__file__).parent / "sglang_server" / "serve.py"
"""Starts SGLang; it is run by path, in SGLang's own environment."""
USE_CPU = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
"""For SGLang, and for `SERVE`: plain torch, of which nothing is compiled. That would take half a minute of a core at
each start, for models that a CPU runs in milliseconds."""

INITIAL_VERSION = "initial"
"""Version of the weights that an engine starts with, before anybody has sent any."""

SCRATCH = "{scratch}"
RENDEZVOUS = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""Where SGLang's processes meet; by default at a port that is open on every address, whatever its --host says."""

DP_ATTENTION = "--enable-dp-attention"
"""With it SGLang's processes speak over TCP, at ports that it derives from others."""

COLOCATED_FRACTION = 0.97
"""SGLang's --mem-fraction-static where its cache is told its size: it lessens the cache by what is not free when it
looks, beyond this share of what was free when it began, and meanwhile the trainer takes its own."""

NO_OVERLAP = "--disable-overlap-schedule"
"""With it SGLang counts a batch's tokens before it does anything else."""

RETURN_ROUTED_EXPERTS = "--enable-return-routed-experts"
"""With it a server tells where it took tokens, if a request asks."""

POLLING_PROCESSES = 2
"""Of an SGLang engine, a GPU, that look for requests all the time, each on a core of its own, at most: the scheduler of
every GPU, and the controller above them with DP attention."""

CPU_RUNNING_REQUESTS = 128
"""Sequences that SGLang generates at once on a CPU."""
CPU_CACHE_TOKENS = 1 << 18
"""Largest cache there, which SGLang would else size by the machine's whole memory."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A server's command line but for its address, and what its environment has besides ours."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """What lies in the server's own folder when it starts, by name. SCRATCH in its arguments and environment stands for
    this folder."""
    derived_ports: tuple[int, ...] = ()
    """By how much the ports that it opens beside the one it is told of are above that."""


def launch_embedded(
    model_path: Path,
    *,
    weight_version: str,
    threads: int,
    context_length: int | None = None,
    max_running_requests: int = 256,
    returns_routed_experts: bool = False,
) -> Launch:
    """The embedded engine, for machines without a GPU."""
    arguments = [
        *(sys.executable, "-m", "recipe.engines.embedded"),
        *("--model-path", str(model_path)),
        *("--weight-version", weight_version),
        *("--threads", str(threads)),
        *("--max-running-requests", str(max_running_requests)),
    ]
    if context_length is not None:
        arguments += ["--context-length", str(context_length)]
    if returns_routed_experts:
        arguments.append(RETURN_ROUTED_EXPERTS)
    return Launch(tuple(arguments), {"OMP_NUM_THREADS": str(threads)})


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of an engine over several."""

    node_rank: int
    nnodes: int
    dist_init_addr: str
    """Where they meet, HOST:PORT on the first machine; see `dist_init`."""
    address: str
    """This machine's, as the others reach it."""
    interfaces: Mapping[str, str]
    """Variables that bind gloo and NCCL to the interface with this address."""


@dataclass(frozen=True, slots=True)
class SglangServer:
    """What one server of SGLang's is."""

    python: Path
    """The interpreter that it is installed in."""
    gpus: tuple[int, ...] | None
    """The numbers of its GPUs on its machine; empty: whichever it sees first; None: it runs on the CPU."""
    arguments: tuple[str, ...] = ()
    """The user's own, which have the last word."""
    dtype: str = "auto"
    tp_size: int = 1
    releases_memory: bool = False
    """Whether its GPUs are a trainer's too."""
    cache_tokens: int | None = None
    """Tokens that its cache holds on each of its GPUs; None: SGLang sizes the cache by what is free."""
    keeps_draft: bool = False
    """Whether it drafts with weights that no trainer sends, and that must outlive a release of its memory."""
    names_tensors: bool = False
    """Whether its tensors are to be those that `weight_sync.checksum` knows."""
    returns_routed_experts: bool = False
    """Whether it tells where it took tokens, if a request asks."""
    keeps_cache: bool = False
    """Whether it takes weights with requests and their cache in place: no batch may then be under way on the GPU whose
    tokens are not counted yet."""
    speculation: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    """SGLang's `speculative_adaptive_config`, by the least batch size that each part is for; empty: it always
    speculates as its arguments say."""
    node: Node | None = None
    """Which machine of an engine over several this is; None: it is on one."""
    health_timeout_s: float = 20.0
    """After so long without a token /health_generate tells that it does not generate."""

    @classmethod
    def of(cls, config: Config, gpus: Sequence[int], node: Node | None = None, cache_tokens: int | None = None) -> Self:
        """An engine of a run, in the trainer's precision, or its part on one machine. Raises UserError if SGLang is
        installed nowhere."""
        return cls(
            python=sglang_python(config.rollout.rollout_engine_python),
            gpus=tuple(gpus) or None,
            arguments=tuple(config.sglang.command_line()),
            dtype="bfloat16" if config.model.bf16 else "float32",
            tp_size=EngineLayout.of(config).tp,
            releases_memory=config.cluster.colocate,
            cache_tokens=cache_tokens,
            keeps_draft="speculative_algorithm" in config.sglang.args and not config.mtp.mtp_num_layers,
            names_tensors=config.rollout.check_weight_update_equal,
            returns_routed_experts=config.grpo.replays_rollouts,
            keeps_cache=config.rollout.update_weight_in_flight == "keep",
            speculation=_speculation(config.sglang),
            node=node,
            health_timeout_s=config.rollout.rollout_health_check_timeout,
        )


def _speculation(sglang: SglangConfig) -> Mapping[str, Mapping[str, Sequence[int]]]:
    """As many draft tokens as ever up to `--speculative-max-batch` sequences at once, and none beyond."""
    if sglang.speculative_max_batch is None:
        return {}
    steps = sglang.args.get("speculative_num_steps", DEFAULT_DRAFT_STEPS)
    assert isinstance(steps, int)
    return {"1": {"candidate_steps": [steps]}, str(sglang.speculative_max_batch + 1): {"candidate_steps": [0]}}


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
    if server.returns_routed_experts:
        arguments.append(RETURN_ROUTED_EXPERTS)
    derived = DERIVED_FROM_PORT if server.node is None and DP_ATTENTION in server.arguments else ()
    python = str(server.python)
    environment = {"SGLANG_HEALTH_CHECK_TIMEOUT": str(math.ceil(server.health_timeout_s)), **_doors(server.node)}
    if server.node is not None:
        arguments += [
            *("--nnodes", str(server.node.nnodes)),
            *("--node-rank", str(server.node.node_rank)),
            *("--dist-init-addr", server.node.dist_init_addr),
        ]
    if server.gpus is not None:
        if server.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, server.gpus))
        files = {"speculation.json": json.dumps(server.speculation)} if server.speculation else {}
        words = [python, str(SERVE), *arguments, *_on_gpus(server), *server.arguments]
        if server.releases_memory:
            environment |= without_expandable_segments()
        if server.cache_tokens is not None:
            words += ["--mem-fraction-static", str(COLOCATED_FRACTION), "--max-total-tokens", str(server.cache_tokens)]
            # While the trainer takes its memory, GPUs are not equally full.
            environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
        return Launch(tuple(words), environment, files, derived)
    tokens = min(CPU_RUNNING_REQUESTS * context_length, CPU_CACHE_TOKENS)
    arguments += [
        *("--device", "cpu"),
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        *("--max-running-requests", str(CPU_RUNNING_REQUESTS)),
        *("--max-total-tokens", str(tokens)),
        NO_OVERLAP,
        "--disable-cuda-graph",
        "--sleep-on-idle",  # a core each, which the trainer needs
    ]
    environment |= USE_CPU | {"OMP_NUM_THREADS": str(threads)}
    if server.tp_size > 1:
        # SGLang wants to be told, or a NUMA node for each rank; its own kernels alone heed it.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * server.tp_size)
    return Launch((python, str(SERVE), *arguments, *server.arguments), environment, derived_ports=derived)


def _doors(node: Node | None) -> dict[str, str]:
    """What keeps an engine's processes from listening anywhere but where their peers are."""
    if node is None:
        return {"GLOO_SOCKET_IFNAME": "lo", RENDEZVOUS: f"file://{SCRATCH}/rendezvous"}
    return {
        **node.interfaces,
        "SGLANG_HOST_IP": node.address,
        RENDEZVOUS: f"tcp://{node.dist_init_addr}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _on_gpus(server: SglangServer) -> list[str]:
    arguments = []
    if server.releases_memory:
        arguments.append("--enable-memory-saver")
        if server.keeps_draft:
            arguments.append("--enable-draft-weights-cpu-backup")
    if server.names_tensors:
        arguments.append("--disable-shared-experts-fusion")
    if server.keeps_cache:
        arguments.append(NO_OVERLAP)
    if server.speculation:
        arguments += ["--speculative-adaptive", "--speculative-adaptive-config", f"{SCRATCH}/speculation.json"]
    return arguments


def sglang_python(named: Path | None) -> Path:
    """The interpreter that SGLang is installed in, see `find_sglang_python`. Raises UserError if there is none."""
    python = find_sglang_python(named)
    if python is None:
        raise UserError(
            "SGLang is not installed: `make install-sglang` puts it, for CPUs, into .venv-sglang; name the interpreter "
            "of an environment that has it with --rollout-engine-python, or use --rollout-engine embedded"
        )
    return python
