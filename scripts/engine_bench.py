"""An SGLang engine under measurement: started, loaded by our client and by SGLang's own benchmark, asked for its
memory and its answers."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from counting_model import TrainerProcess, write_model

from recipe.config import Architecture
from recipe.data.prompts import Prompt
from recipe.engines.launch import SERVE, USE_CPU, SglangServer, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.rollout.generate import Rollout, SeedStream, generate_rollout
from recipe.sampling.http import ask_blocking
from recipe.sampling.routing import RouterShape
from recipe.sampling.sample import Sample, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

ON_GPU = ("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none")
RUN_THEIRS = f"""
import importlib.machinery, os, runpy, sys, types
import torch
if not torch.cuda.is_available():
    os.environ |= {USE_CPU!r}
    sys.path.append({str(SERVE.parent)!r})
    import serve
# It imports `datasets` for image benchmarks, whether they run or not.
unused = types.ModuleType("datasets")
unused.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
unused.load_dataset = None
sys.modules["datasets"] = unused
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
"""
FEWER = (
    ("--disable-prefill-cuda-graph",),
    ("--disable-prefill-cuda-graph", "--disable-shared-experts-fusion"),
    ("--disable-prefill-cuda-graph", "--disable-shared-experts-fusion", "--disable-decode-cuda-graph"),
)
"""Of SGLang's features, in turn, until it starts."""
START_LIMIT_S = 300.0
FIRST = "initial"
"""Version of the weights that an engine starts with."""


class FixedLength(SamplingParams):
    """Responses that no end token ends."""

    def request(self, seed: int, generated: int = 0) -> dict[str, object]:
        return SamplingParams.request(self, seed, generated) | {"ignore_eos": True}


class SpreadLength(SamplingParams):
    """Responses that no end token ends and that end apart from one another: of 1 to twice `max_new_tokens` - 1 tokens,
    drawn by their seeds."""

    def request(self, seed: int, generated: int = 0) -> dict[str, object]:
        length = int(np.random.default_rng(seed).integers(1, 2 * self.max_new_tokens))
        longest = replace(self, max_new_tokens=length)
        return SamplingParams.request(longest, seed, generated) | {"ignore_eos": True}


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    folder: Path
    """For models and logs."""
    results: Path
    layers: int | None
    equal_layers: int
    on_gpu: bool
    python: Path
    input_len: int
    output_len: int
    at_once: tuple[int, ...]
    memory_fraction: float
    accept_length: float
    bucket_bytes: int
    engine_args: tuple[str, ...]
    deadline: float = 0.0
    """Of the part under way, by time.monotonic()."""

    @property
    def left(self) -> float:
        """Seconds that the part has. Raises TimeoutError when it has none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        return left

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    def tell(self, part: str, what: str, **figures: object) -> None:
        """Prints and keeps what is known."""
        print(f"{part:7} {what}: {', '.join(f'{name} {_short(value)}' for name, value in figures.items())}", flush=True)
        with (self.results / "results.jsonl").open("a") as file:
            print(json.dumps({"part": part, "what": what, **figures}), file=file)

    def model(self, name: str, layers: int | None) -> tuple[Path, Architecture]:
        """A folder with configuration and tokenizer, made once."""
        folder = self.folder / name
        if folder.exists():
            return folder, Architecture.from_checkpoint(folder)
        return folder, write_model(folder, layers=layers, tiny=not self.on_gpu)

    def trainer(self, folder: Path) -> TrainerProcess:
        device = "cuda" if self.on_gpu else "cpu"
        return TrainerProcess(folder, device, self.dtype, self.bucket_bytes)

    @contextmanager
    def engine(
        self, name: str, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[EngineProcess]:
        """SGLang, not yet healthy. If the block fails, the end of the engine's log is printed."""
        server = SglangServer(
            python=self.python,
            gpus=() if self.on_gpu else None,
            arguments=(*(ON_GPU if self.on_gpu else ()), *arguments, *self.engine_args),
            dtype=str(self.dtype).removeprefix("torch."),
            releases_memory=True,
        )
        launch = launch_sglang(
            folder,
            server,
            weight_version=FIRST,
            threads=os.cpu_count() or 1,
            context_length=4096 if self.on_gpu else 1024,
        )
        launch = replace(launch, environment={**launch.environment, **(environment or {})})
        log = self.results / f"{name}.log"
        with EngineProcess(launch, log) as process:
            try:
                yield process
            except Exception:
                self._show_end(log)
                raise

    @staticmethod
    def _show_end(log: Path) -> None:
        print(f"the end of {log}:", *log.read_text(errors="replace").splitlines()[-40:], sep="\n", flush=True)

    @contextmanager
    def started(
        self, part: str, name: str, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[EngineProcess]:
        """SGLang, healthy; with fewer of its features if it does not start with all."""
        for attempt, without in enumerate(FEWER if self.on_gpu else [()]):
            started = time.monotonic()
            log = f"{name}.{attempt}" if attempt else name
            with ExitStack() as stack:
                try:
                    engine = stack.enter_context(
                        self.engine(log, folder, *arguments, *without, environment=environment)
                    )
                    engine.wait_healthy(min(self.left, START_LIMIT_S))
                except UserError as error:
                    print(f"{part:7} {log} does not start ({' '.join(without)}): {error}", flush=True)
                    self._show_end(self.results / f"{log}.log")
                    continue
                seconds = time.monotonic() - started
                self.tell(part, f"{log} started", seconds=seconds, gpu_gib=self.gpu_gib(), without=" ".join(without))
                yield engine
                return
        raise UserError("the engine does not start")

    def gpu_gib(self) -> float | None:
        """Memory in use on the GPU, by whomever."""
        if not self.on_gpu:
            return None
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024


def _short(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def prompts_of(count: int, length: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Random tokens, no two prompts alike."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (count, length))
    return [Prompt(number, (), "", tuple(row.tolist()), "") for number, row in enumerate(ids)]


class OfRollouts(RolloutClient):
    """Asks as rollouts do, and not as evaluations: where the tokens were taken, if `routers` are known."""

    async def generate(
        self, group: SampleGroup, sampling: SamplingParams, seeds: Sequence[int], *, routed: bool = True
    ) -> None:
        await super().generate(group, sampling, seeds, routed=routed)


async def _generate(
    bench: Bench,
    url: str,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    at_once: int,
    n_samples: int,
    version: str,
    routers: RouterShape | None = None,
) -> Rollout:
    options = ClientOptions(max_concurrency=at_once, request_timeout_s=bench.left, routers=routers)
    async with asyncio.timeout(bench.left), OfRollouts([url], options) as client:
        return await generate_rollout(
            client,
            prompts,
            n_samples=n_samples,
            sampling=sampling,
            seeds=SeedStream(0, ("bench",)),
            expected_version=version,
        )


def ours(
    bench: Bench,
    url: str,
    vocabulary: int,
    at_once: int,
    count: int,
    n_samples: int = 1,
    routers: RouterShape | None = None,
    spread: bool = False,
) -> float:
    """Tokens a second of `count` responses, `at_once` of them under way, through the client of training; with `routers`
    they bring the experts of each token, with `spread` their lengths differ."""
    prompts = prompts_of(count // n_samples, bench.input_len, vocabulary, seed=at_once * n_samples)
    sampling = (SpreadLength if spread else FixedLength)(max_new_tokens=bench.output_len)
    answers = _generate(bench, url, prompts, sampling, at_once // n_samples, n_samples, FIRST, routers)
    metrics = asyncio.run(answers).metrics
    assert spread or metrics.response_tokens == count * bench.output_len
    return metrics.response_tokens / metrics.seconds


def theirs(bench: Bench, url: str, folder: Path, at_once: int, count: int, *, log_probs: bool) -> float:
    """The same by SGLang's own benchmark, which streams."""
    output = bench.folder / f"theirs-{at_once}-{log_probs}-{time.monotonic()}.jsonl"
    words = f"--backend sglang --base-url {url} --model {folder} --tokenizer {folder} --dataset-name random-ids "
    words += f"--tokenize-prompt --random-input-len {bench.input_len} --random-output-len {bench.output_len} "
    words += f"--random-range-ratio 1.0 --num-prompts {count} --max-concurrency {at_once} --temperature 1.0 "
    words += f"--seed {at_once} --disable-tqdm --output-file {output}"
    result = subprocess.run(
        [str(bench.python), "-c", RUN_THEIRS, *words.split(), *["--return-logprob"] * log_probs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=bench.left,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if result.returncode or not output.exists():
        raise RuntimeError(f"bench_serving ended with {result.returncode}: {result.stdout[-1500:]}")
    figures = json.loads(output.read_text().splitlines()[-1])
    if figures["completed"] != count:
        raise RuntimeError(f"bench_serving completed {figures['completed']} of {count}: {result.stdout[-1500:]}")
    return float(figures["output_throughput"])


def probe(bench: Bench, url: str, vocabulary: int, version: str) -> list[Sample]:
    """Greedy responses with their log-probabilities, to compare weights by."""
    prompts = prompts_of(8, 16, vocabulary, seed=1)
    sampling = FixedLength(max_new_tokens=24, temperature=0.0)
    _post(bench, url, "/flush_cache")
    rollout = asyncio.run(_generate(bench, url, prompts, sampling, len(prompts), 1, version))
    return [group.samples[0] for group in rollout.groups]


def difference(left: Sequence[Sample], right: Sequence[Sample]) -> dict[str, float]:
    """Of log-probabilities as far as the tokens are the same."""
    gaps = [
        abs(one - other)
        for a, b in zip(left, right, strict=True)
        for id_a, id_b, one, other in zip(
            a.response_ids, b.response_ids, a.rollout_log_probs, b.rollout_log_probs, strict=True
        )
        if id_a == id_b
    ]
    total = sum(sample.response_length for sample in left)
    return {
        "mean_gap": float(np.mean(gaps or [9])),
        "max_gap": max(gaps, default=9.0),
        "same_tokens": len(gaps) / total,
    }


def _post(bench: Bench, url: str, path: str, **body: object) -> float:
    started = time.monotonic()
    ask_blocking("POST", url + path, body, timeout_s=bench.left)
    return time.monotonic() - started


def release(bench: Bench, url: str, *tags: str) -> float:
    return _post(bench, url, "/release_memory_occupation", tags=tags)


def resume(bench: Bench, url: str, *tags: str) -> float:
    return _post(bench, url, "/resume_memory_occupation", tags=tags)
