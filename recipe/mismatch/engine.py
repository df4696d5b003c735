"""A step's samples once more through the engine, which reads them whole instead of making them token by token."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipe.config import Config, Resolved
from recipe.engines.launch import Launch, SglangServer, launch_embedded, launch_sglang
from recipe.engines.process import EngineProcess
from recipe.messages import FloatArray, Scores, TrainSample
from recipe.sampling.errors import EngineAnswerError
from recipe.sampling.http import ask_blocking
from recipe.sampling.routing import RouterShape, read_routed_experts
from recipe.sampling.sampling_params import SamplingParams

SEVERAL_GPUS = (
    *("dp_size", "ep_size", "enable_dp_attention", "enable_dp_lm_head", "moe_dense_tp_size", "max_total_tokens"),
    *("speculative_algorithm", "speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens"),
)
"""SGLang's arguments that an engine of one GPU, which drafts nothing, is not given."""
AT_ONCE = 8
"""Samples of a request."""
TIMEOUT_S = 600.0
START_S = 900.0


def scores(resolved: Resolved, weights: Path, samples: Sequence[TrainSample], log: Path) -> Scores:
    """The engine's log-probs of the responses under these weights, and where it took their tokens. Raises UserError if
    it cannot be started, EngineError if it does not answer as SGLang does."""
    shape, found = RouterShape.of(resolved.architecture), Scores({})
    with EngineProcess(_launch(resolved, weights), log) as process:
        process.wait_healthy(START_S)
        for start in range(0, len(samples), AT_ONCE):
            batch = samples[start : start + AT_ONCE]
            body = {
                "input_ids": [sample.tokens.tolist() for sample in batch],
                "sampling_params": [SamplingParams(max_new_tokens=1).request(0)] * len(batch),
                "return_logprob": True,
                "logprob_start_len": 0,
                "return_routed_experts": True,
            }
            answers = ask_blocking("POST", process.url + "/generate", body, timeout_s=TIMEOUT_S)
            for sample, answer in zip(batch, answers, strict=True):
                found += _read(sample, answer["meta_info"], shape)
    return found


def _read(sample: TrainSample, meta: dict[str, Any], shape: RouterShape) -> Scores:
    told = [entry[0] for entry in meta["input_token_logprobs"]][len(sample.prompt) :]
    if len(told) != sample.response_length or any(type(one) not in (float, int) for one in told):
        raise EngineAnswerError(f"the engine tells {len(told)} log-probs of a response of {sample.response_length}")
    log_probs: FloatArray = np.array(told, dtype=np.float32)
    experts = read_routed_experts(meta.get("routed_experts"), shape)[: sample.length - 1]
    return Scores({sample.index: log_probs}, {sample.index: experts})


def _launch(resolved: Resolved, weights: Path) -> Launch:
    config = _alone(resolved.config)
    if config.rollout.engine == "embedded":
        return launch_embedded(
            weights, weight_version="0", threads=1, context_length=_context(resolved), returns_routed_experts=True
        )
    server = SglangServer.of(config, gpus=())
    on_cpu = config.cluster.device == "cpu"
    server = replace(server, gpus=None if on_cpu else (), releases_memory=False, returns_routed_experts=True)
    return launch_sglang(weights, server, weight_version="0", threads=1, context_length=_context(resolved))


def _context(resolved: Resolved) -> int:
    """The run's, and the token that is generated for a request to be one."""
    return min(resolved.max_context_len + 8, resolved.architecture.max_position_embeddings)


def _alone(config: Config) -> Config:
    args = {name: value for name, value in config.sglang.args.items() if name not in SEVERAL_GPUS}
    sglang = config.sglang.model_copy(
        update={"args": args, "rollout_num_gpus_per_engine": 1, "speculative_max_batch": None}
    )
    return config.model_copy(update={"sglang": sglang})
