"""SGLang's /generate as far as this project's client speaks it: what a request says, what makes it wrong, and what an
answer looks like."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer

from recipe.engines.embedded.running_sequence import RunningSequence, Sampling
from recipe.sampling.routing import encode_routed_experts

GREEDY_BELOW = 1e-6
SEEDS = range(-(2**63), 2**63)


class RequestError(ValueError):
    """A request the engine refuses; answered with status 400."""


class Body(BaseModel):
    """What a request says: no field may be missing, and one that is not known is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class SamplingBody(Body):
    """`sampling_params` of one prompt."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    stop_token_ids: list[int]
    skip_special_tokens: Literal[False]
    sampling_seed: int


class GenerateBody(Body):
    """The body of /generate: a list of prompts."""

    input_ids: list[list[int]]
    sampling_params: list[SamplingBody]
    return_logprob: Literal[True]
    logprob_start_len: Literal[0, -1] = -1
    """0: the log-probs of the prompt's tokens too."""
    return_routed_experts: bool = False
    extra_key: str | None = None
    """Prompts share a prefix cache only under one key; this engine has none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine can take."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    keeps_experts: bool = False
    """Whether it can tell where tokens were routed."""


def read_sequences(body: GenerateBody, limits: Limits) -> list[RunningSequence]:
    """The sequences a request asks for. Raises RequestError, with SGLang's reasons, if there is anything wrong."""
    prompts, params = body.input_ids, body.sampling_params
    if len(params) != len(prompts):
        raise RequestError(f"sampling_params has {len(params)} entries for {len(prompts)} prompts.")
    if not prompts:
        raise RequestError("input_ids cannot be empty.")
    for prompt in prompts:
        _check_prompt(prompt, limits)
    asked = body.return_routed_experts
    _require(limits.keeps_experts or not asked, "return_routed_experts needs --enable-return-routed-experts", asked)
    return [
        RunningSequence(
            tuple(prompt),
            _sampling(param, len(prompt), limits),
            returns_input_log_probs=body.logprob_start_len == 0,
            returns_routed_experts=asked,
        )
        for prompt, param in zip(prompts, params, strict=True)
    ]


def _check_prompt(ids: list[int], limits: Limits) -> None:
    if not ids:
        raise RequestError("input_ids cannot be empty.")
    if len(ids) >= limits.context_length:
        raise RequestError(
            f"The input ({len(ids)} tokens) is longer than the model's context length ({limits.context_length} tokens)."
        )
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < limits.vocab_size)
        raise RequestError(
            f"input_ids contains out-of-vocabulary token id {wrong}; valid range is [0, {limits.vocab_size})."
        )


def _sampling(body: SamplingBody, prompt_length: int, limits: Limits) -> Sampling:
    temperature, top_p, top_k, stop = body.temperature, body.top_p, body.top_k, tuple(body.stop)
    length, seed = body.max_new_tokens, body.sampling_seed
    _require(
        math.isfinite(temperature) and temperature >= 0, "temperature must be a non-negative finite number", temperature
    )
    _require(0.0 < top_p <= 1.0, "top_p must be in (0, 1]", top_p)
    _require(top_k == -1 or top_k >= 1, "top_k must be -1 (disable) or at least 1", top_k)
    _require(length >= 1, "max_new_tokens must be at least 1", length)
    _require(seed in SEEDS, "sampling_seed must be in [-2**63, 2**63 - 1]", seed)
    _require(not stop or limits.tokenizer is not None, "stop needs a tokenizer, and the model's folder has none", stop)
    if length > limits.context_length - prompt_length:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {limits.context_length} tokens: "
            f"{prompt_length} tokens of input and {length} tokens for the completion."
        )
    greedy = temperature < GREEDY_BELOW
    return Sampling(
        max_new_tokens=length,
        temperature=1.0 if greedy else temperature,
        greedy=greedy,
        top_p=top_p,
        top_k=limits.vocab_size if top_k == -1 else top_k,
        seed=seed,
        stop=stop,
        stop_token_ids=(*limits.eos_token_ids, *body.stop_token_ids),
    )


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise RequestError(f"{rule}, got {got}.")


def answer(sequence: RunningSequence, text: str | None) -> dict[str, Any]:
    """One sequence in SGLang's form; no text without a tokenizer."""
    spans = sequence.version_spans()
    meta: dict[str, Any] = {
        "finish_reason": sequence.finish_reason,
        "weight_version": spans[-1]["version"],
        "weight_versions": spans,
        "output_token_logprobs": [
            (log_prob, token, None) for log_prob, token in zip(sequence.log_probs, sequence.output_ids, strict=True)
        ],
    }
    if sequence.returns_input_log_probs:
        told = zip([None, *sequence.input_log_probs], sequence.prompt_ids, strict=True)
        meta["input_token_logprobs"] = [(log_prob, token, None) for log_prob, token in told]
    if sequence.routed_experts is not None:
        meta["routed_experts"] = encode_routed_experts(sequence.routed_experts)
    result: dict[str, Any] = {} if text is None else {"text": text}
    return result | {"output_ids": sequence.output_ids, "meta_info": meta}
