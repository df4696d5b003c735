"""How fast the engine of a recipe generates on this machine's GPUs, by sequences at once and tokens before them: SGLang
as the recipe starts it, all layers, with the checkpoint's weights or, where those are not there, with random ones.

A point is measured by asking for the same responses twice, short and longer, of prompts that the engine has read
before: what the longer ones take more is decoding alone. With EAGLE, drafts are accepted by chance so that a
verification brings a given number of tokens.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np

from recipe.config import Architecture, Config, Resolved
from recipe.config.error_text import listed
from recipe.config.sglang_rules import size_of
from recipe.engines.launch import INITIAL_VERSION, Launch, SglangServer, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.plan.decode_points import DecodePoint, EngineKind, MeasuredDecoding
from recipe.plan.machine import read_gpus
from recipe.sampling.http import ask, ask_blocking, open_session
from recipe.sampling.sampling_params import SamplingParams
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

    def __init__(self, url: str, vocabulary: int, groups: int, seed: int) -> None:
        """`groups`: of its GPUs that hold different sequences, each with a cache of its own."""
        self.url, self.groups = url, groups
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
        if self.groups > 1:  # each prompt goes where it was read
            body["routed_dp_rank"] = seed % self.groups
        answer = await ask(session, "POST", f"{self.url}/generate", body, timeout_s=REQUEST_TIMEOUT_S)
        if (got := answer["meta_info"]["completion_tokens"]) != tokens:
            raise UserError(f"{self.url} answered with {got} tokens of the {tokens} that it was asked for")

    def point(self, sequences: int, context: int) -> DecodePoint:
        """Measured after the prompts have been read: the quicker of two times each. Raises UserError if more tokens
        took no longer."""
        prompts = self.prompts(sequences, context)
        short, long = (min(self.seconds(prompts, tokens) for _ in range(2)) for tokens in (SHORT, LONG))
        if long <= short:
            raise UserError(
                f"{sequences} responses of {LONG} tokens took {long:.2f} s and of {SHORT} tokens {short:.2f} s: "
                "something else keeps this machine busy; measure again when it has ended"
            )
        return DecodePoint(sequences, context + (SHORT + LONG) // 2, (long - short) / (LONG - SHORT))

    def points(self, each: Sequence[int], contexts: Sequence[int]) -> Iterator[DecodePoint]:
        """`each` sequences of every group at every context, as far as its cache holds them; tells what it does not."""
        most = int(self.cache_tokens * WHOLE_CACHE)
        self.seconds(self.prompts(self.groups * min(each), min(contexts)), LONG)  # what is compiled at its first use
        for context in sorted(contexts):
            fitting = sorted(size for size in each if size * (context + LONG) <= most)
            if left_out := sorted(set(each) - set(fitting)):
                print(f"the cache holds no {listed(left_out)} sequences of {context} tokens: left out", flush=True)
            if fitting:
                self.seconds(self.prompts(self.groups * fitting[-1], context), 1)
            for size in fitting:
                yield self.point(self.groups * size, context)


def has_weights(config: Config) -> bool:
    """Whether the checkpoint is there, and not its config.json alone."""
    return any(config.model.hf_checkpoint.glob("*.safetensors"))


def launch_of(resolved: Resolved, folder: Path, context: int, accept_length: float) -> Launch:
    """The recipe's engine on the first GPUs; without any, on the CPU. `folder` gets what it reads besides."""
    config = resolved.config
    random = not has_weights(config)
    if random:
        shutil.copy(config.model.hf_checkpoint / "config.json", folder)
    server = replace(SglangServer.of(config, ()), gpus=() if read_gpus() else None)
    model = folder if random else config.model.hf_checkpoint.resolve()
    launch = launch_sglang(model, server, weight_version=INITIAL_VERSION, threads=1, context_length=context + 2 * LONG)
    further = ["--skip-tokenizer-init", *(["--load-format", "dummy"] if random else [])]
    environment = dict(launch.environment)
    if "speculative_algorithm" in config.sglang.args:
        if random:  # SGLang's loader of random weights cannot make the MTP layer, so it reads one
            write_draft(draft := folder / "draft", folder, resolved.architecture)
            further += ["--speculative-draft-model-path", str(draft), "--speculative-draft-load-format", "auto"]
        environment |= {
            "SGLANG_SIMULATE_ACC_LEN": str(accept_length),
            "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
        }
    return Launch((*launch.arguments, *further), environment, launch.files, launch.derived_ports)


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
                tensor = torch.empty(placement.hf_shape, dtype=dtype)
                tensors[hf_name] = tensor.normal_(0, DEVIATION, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def widened(config: Config, groups: int, most: int) -> Config:
    """The engine with room, and CUDA graphs, for `most` sequences of each group, and with drafts at all of them if it
    drafts at all; what `make tune` proposes has more at once than many recipes."""
    args = dict(config.sglang.args)
    args["max_running_requests"] = max(size_of(config, "max_running_requests", default=1), most * groups)
    args["cuda_graph_max_bs_decode"] = max(size_of(config, "cuda_graph_max_bs_decode", default=1), most)
    for name in ("cuda_graph_bs_decode", "disable_cuda_graph"):
        args.pop(name, None)
    sglang = config.sglang.model_copy(update={"args": args, "speculative_max_batch": None})
    return config.model_copy(update={"sglang": sglang})


@contextmanager
def running_engine(
    resolved: Resolved, context: int, accept_length: float, log: Path, most: int = max(SEQUENCES)
) -> Iterator[Engine]:
    """The recipe's engine, with room for `most` sequences of each group of GPUs at up to `context` tokens, until the
    block ends. Raises UserError if it does not start."""
    kind = EngineKind.of(resolved.architecture, resolved.config)
    resolved = replace(resolved, config=widened(resolved.config, kind.groups, most))
    config, began = resolved.config, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        brought = tokens_brought(kind, accept_length)
        with EngineProcess(launch_of(resolved, Path(name), context, brought), log) as process:
            process.wait_healthy(config.rollout.rollout_engine_start_timeout_s)
            weights = "its checkpoint's" if has_weights(config) else "random"
            print(f"the engine started in {time.monotonic() - began:.0f} s with {weights} weights", flush=True)
            yield Engine(process.url, resolved.architecture.vocab_size, kind.groups, config.misc.seed)


def tokens_brought(kind: EngineKind, accept_length: float) -> float:
    """By a verification that is to bring so many: there are no more than there are drafts, and the next token."""
    return min(accept_length, kind.draft_steps + 1.0)


def measure_decoding(
    engine: Engine, resolved: Resolved, contexts: Sequence[int], accept_length: float
) -> MeasuredDecoding:
    """The recipe's engine, which runs. Raises UserError if it ends, or is disturbed."""
    kind, found = EngineKind.of(resolved.architecture, resolved.config), []
    for point in engine.points(SEQUENCES, contexts):
        print(point, flush=True)
        found.append(point)
    return MeasuredDecoding(kind, tokens_brought(kind, accept_length), tuple(found))
