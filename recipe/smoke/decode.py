"""How fast the engine of a recipe generates on this machine's GPUs, by sequences at once and tokens before them: SGLang
as the recipe starts it, all layers, with random weights, so that it needs no checkpoint.

A point is measured by asking for the same responses twice, short and longer, of prompts that the engine has read
before: what the longer ones take more is decoding alone. With EAGLE, drafts are accepted by chance so that a
verification brings a given number of tokens.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np

from recipe.config import Architecture, Config, Resolved
from recipe.config.sglang_rules import EngineLayout, size_of
from recipe.engines.launch import INITIAL_VERSION, Launch, SglangServer, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.plan.decode_points import DecodePoint, MeasuredDecoding
from recipe.plan.machine import read_gpus
from recipe.rollout.http import ask, ask_blocking, open_session
from recipe.rollout.sampling_params import SamplingParams
from recipe.system.errors import UserError
from recipe.system.seeds import derive
from recipe.weights.table import placements

SEQUENCES = (1, 4, 16, 64)
"""At once, of each group of GPUs."""
SHORT, LONG = 16, 80
"""Tokens of the two responses."""
FIRST_TOKEN = 3
"""Of random prompts: those before it are special."""
REQUEST_TIMEOUT_S = 120.0
MTP = "mtp."
"""Begins the names of the MTP layer's tensors in megatron."""
DEVIATION = 0.02
WHOLE_CACHE = 0.95
"""Share of the engine's cache that the prompts of a point may take."""


class Engine:
    """A running engine under measurement."""

    def __init__(self, url: str, vocabulary: int, seed: int) -> None:
        self.url = url
        self._draw = np.random.default_rng(derive(seed, "decode"))
        self._vocabulary = vocabulary
        self._prompts: list[list[int]] = []

    @property
    def cache_tokens(self) -> int:
        """Of each group of GPUs."""
        return int(ask_blocking("GET", f"{self.url}/server_info", timeout_s=REQUEST_TIMEOUT_S)["max_total_num_tokens"])

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """The first tokens of the first sequences: longer ones begin as the shorter ones did, and are in the cache as
        far as those were."""
        while len(self._prompts) < count:
            self._prompts.append([])
        for prompt in self._prompts[:count]:
            more = self._draw.integers(FIRST_TOKEN, self._vocabulary, max(0, length - len(prompt)))
            prompt += more.tolist()
        return [prompt[:length] for prompt in self._prompts[:count]]

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """In which the engine answers all prompts at once with so many tokens each."""
        began = time.monotonic()
        asyncio.run(self._answers(prompts, tokens))
        return time.monotonic() - began

    async def _answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        async with open_session() as session:
            answers = [self._answer(session, prompt, tokens, seed) for seed, prompt in enumerate(prompts)]
            await asyncio.gather(*answers)

    async def _answer(self, session: aiohttp.ClientSession, prompt: Sequence[int], tokens: int, seed: int) -> None:
        sampling = SamplingParams(tokens).request(seed) | {"ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        answer = await ask(session, "POST", f"{self.url}/generate", body, timeout_s=REQUEST_TIMEOUT_S)
        if (got := answer["meta_info"]["completion_tokens"]) != tokens:
            raise UserError(f"{self.url} answered with {got} tokens of the {tokens} that it was asked for")

    def point(self, sequences: int, context: int) -> DecodePoint:
        """Measured after the prompts have been read."""
        prompts = self.prompts(sequences, context)
        short, long = (self.seconds(prompts, tokens) for tokens in (SHORT, LONG))
        return DecodePoint(sequences, context + (SHORT + LONG) // 2, (long - short) / (LONG - SHORT))

    def points(self, batches: Sequence[int], contexts: Sequence[int], groups: int) -> Iterator[DecodePoint]:
        """Every batch at every context that the cache of each of so many groups of GPUs holds."""
        most = int(self.cache_tokens * WHOLE_CACHE)
        self.seconds(self.prompts(min(batches), min(contexts)), LONG)  # what is compiled at its first use
        for context in sorted(contexts):
            fitting = [size for size in batches if -(-size // groups) * (context + LONG) <= most]
            if fitting:
                self.seconds(self.prompts(max(fitting), context), 1)
            for size in sorted(fitting):
                yield self.point(size, context)


def groups_of(config: Config) -> int:
    """Groups of an engine's GPUs that hold different sequences."""
    layout = EngineLayout.of(config)
    return layout.dp if layout.dp_attention else 1


def batches_of(config: Config) -> list[int]:
    """Sequences of the whole engine that are measured."""
    return [each * groups_of(config) for each in SEQUENCES]


def launch_of(resolved: Resolved, folder: Path, context: int, accept_length: float) -> Launch:
    """The recipe's engine with random weights, on the first GPUs; without any, on the CPU."""
    config = resolved.config
    server = replace(SglangServer.of(config, ()), gpus=() if read_gpus() else None)
    launch = launch_sglang(folder, server, weight_version=INITIAL_VERSION, threads=1, context_length=context + 2 * LONG)
    random = ["--load-format", "dummy", "--skip-tokenizer-init"]
    environment = dict(launch.environment)
    if is_speculative(config):
        # SGLang's loader of random weights cannot make the MTP layer, so it reads one.
        write_draft(draft := folder / "draft", folder, resolved.architecture)
        random += ["--speculative-draft-model-path", str(draft), "--speculative-draft-load-format", "auto"]
        environment |= {
            "SGLANG_SIMULATE_ACC_LEN": str(accept_length),
            "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
        }
    return Launch((*launch.arguments, *random), environment, launch.files, launch.derived_ports)


def is_speculative(config: Config) -> bool:
    return "speculative_algorithm" in config.sglang.args


def write_draft(folder: Path, model: Path, architecture: Architecture) -> None:
    """A checkpoint of the MTP layer alone, of random weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, placement in placements(architecture, with_mtp=True).items():
        if name.startswith(MTP):
            dtype = torch.float32 if placement.is_fp32 else torch.bfloat16
            for hf_name in placement.hf_names:
                tensors[hf_name] = torch.empty(placement.hf_shape, dtype=dtype).normal_(
                    0, DEVIATION, generator=generator
                )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def widened(config: Config) -> Config:
    """The engine with room, and CUDA graphs, for all sequences that are measured; what `make tune` proposes has more of
    them than many recipes."""
    most = max(SEQUENCES)
    args = dict(config.sglang.args)
    args["max_running_requests"] = max(size_of(config, "max_running_requests", default=1), most * groups_of(config))
    args["cuda_graph_max_bs_decode"] = max(size_of(config, "cuda_graph_max_bs_decode", default=1), most)
    args.pop("cuda_graph_bs_decode", None)
    return config.model_copy(update={"sglang": config.sglang.model_copy(update={"args": args})})


def measure_decoding(resolved: Resolved, contexts: Sequence[int], accept_length: float, log: Path) -> MeasuredDecoding:
    """Starts the recipe's engine and measures it. Raises UserError if it does not start, or ends."""
    resolved = replace(resolved, config=widened(resolved.config))
    config, found = resolved.config, []
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        folder = Path(name)
        shutil.copy(config.model.hf_checkpoint / "config.json", folder)
        began = time.monotonic()
        with EngineProcess(launch_of(resolved, folder, max(contexts), accept_length), log) as process:
            process.wait_healthy(config.rollout.rollout_engine_start_timeout_s)
            print(f"the engine started in {time.monotonic() - began:.0f} s", flush=True)
            engine = Engine(process.url, resolved.architecture.vocab_size, config.misc.seed)
            for point in engine.points(batches_of(config), contexts, groups_of(config)):
                print(point, flush=True)
                found.append(point)
    layout = EngineLayout.of(config)
    brought = accept_length if is_speculative(config) else None
    return MeasuredDecoding(layout.tp * layout.pp, groups_of(config), brought, tuple(found))
