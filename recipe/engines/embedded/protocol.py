"""SGLang's /generate: what a request may say, what makes it wrong, and what an answer looks like."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerFast

from recipe.engines.embedded.running_sequence import RunningSequence, Sampling
from recipe.system.seeds import derive

T = TypeVar("T")

GREEDY_BELOW = 1e-6
DEFAULT_NEW_TOKENS = 128
SEEDS = range(-(2**63), 2**63)


class RequestError(ValueError):
    """A request the engine refuses; answered with status 400."""


class SamplingBody(BaseModel):
    """`sampling_params`. What the engine does not do is refused, not ignored; null means the default."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    sampling_seed: int | None = None
    n: int | None = None


class GenerateBody(BaseModel):
    """The body of /generate: one prompt, or a list of prompts with one value or a list of values for the rest."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    stream: bool = False

    @property
    def is_batch(self) -> bool:
        """Whether SGLang answers a list even for one sequence."""
        if self.input_ids is not None:
            return any(isinstance(item, list) for item in self.input_ids)
        return isinstance(self.text, list)


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine can take, and where its own draws come from."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerFast | None


class Defaults:
    """Seeds and ids of the sequences that bring none: both count on from the engine's seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._count = 0

    def next_seed(self) -> int:
        self._count += 1
        return derive(self._seed, self._count)

    def next_rid(self) -> str:
        self._count += 1
        return f"{self._seed:016x}-{self._count}"


def read_sequences(body: GenerateBody, limits: Limits, defaults: Defaults) -> list[RunningSequence]:
    """The sequences a request asks for. Raises RequestError, with SGLang's reasons, if there is anything wrong."""
    if body.stream:
        raise RequestError("this engine does not stream; leave out stream")
    prompts = _prompts(body, limits)
    params = _spread(body.sampling_params or SamplingBody(), len(prompts), "sampling_params")
    repeats = {param.n or 1 for param in params}
    if len(repeats) > 1 or min(repeats) < 1:
        raise RequestError("sampling_params.n must be one positive number for all prompts")
    repeat = repeats.pop()
    wants = _spread(body.return_logprob, len(prompts), "return_logprob")
    starts = _spread(body.logprob_start_len, len(prompts), "logprob_start_len")
    tops = _spread(body.top_logprobs_num, len(prompts), "top_logprobs_num")
    rids = _rids(body.rid, len(prompts) * repeat, defaults)
    return [
        RunningSequence(
            rid=rids[number],
            prompt_ids=prompts[i],
            sampling=_sampling(params[i], len(prompts[i]), limits, defaults),
            with_log_probs=wants[i],
            logprob_start=starts[i] if wants[i] and starts[i] >= 0 else None,
            top_logprobs=tops[i] if wants[i] else 0,
        )
        for number, i in enumerate(list(range(len(prompts))) * repeat)
    ]


def _prompts(body: GenerateBody, limits: Limits) -> list[tuple[int, ...]]:
    if body.input_ids is not None:
        prompts = _as_batch(body.input_ids)
    elif body.text is not None:
        if limits.tokenizer is None:
            raise RequestError("text needs a tokenizer, and the model's folder has none; send input_ids")
        texts = [body.text] if isinstance(body.text, str) else body.text
        prompts = limits.tokenizer(texts)["input_ids"]
    else:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    for prompt in prompts:
        _check_prompt(prompt, limits)
    return [tuple(prompt) for prompt in prompts]


def _as_batch(ids: list[int] | list[list[int]]) -> list[list[int]]:
    batch = [item for item in ids if isinstance(item, list)]
    return batch or [[item for item in ids if isinstance(item, int)]]


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


def _sampling(body: SamplingBody, prompt_length: int, limits: Limits, defaults: Defaults) -> Sampling:
    temperature = _default(body.temperature, 1.0)
    top_p, min_p, top_k = _default(body.top_p, 1.0), _default(body.min_p, 0.0), _default(body.top_k, -1)
    room = limits.context_length - prompt_length
    length = _default(body.max_new_tokens, min(DEFAULT_NEW_TOKENS, room))
    seed = defaults.next_seed() if body.sampling_seed is None else body.sampling_seed
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    ignore_eos = _default(body.ignore_eos, False)
    _require(
        math.isfinite(temperature) and temperature >= 0, "temperature must be a non-negative finite number", temperature
    )
    _require(0.0 < top_p <= 1.0, "top_p must be in (0, 1]", top_p)
    _require(0.0 <= min_p <= 1.0, "min_p must be in [0, 1]", min_p)
    _require(top_k == -1 or top_k >= 1, "top_k must be -1 (disable) or at least 1", top_k)
    _require(length >= 0, "max_new_tokens must be at least 0", length)
    _require(seed in SEEDS, "sampling_seed must be in [-2**63, 2**63 - 1]", seed)
    _require(not stop or limits.tokenizer is not None, "stop needs a tokenizer, and the model's folder has none", stop)
    if length > room:
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
        min_p=min_p,
        seed=seed,
        stop=stop,
        stop_token_ids=() if ignore_eos else (*limits.eos_token_ids, *(body.stop_token_ids or ())),
        no_stop_trim=_default(body.no_stop_trim, False),
        skip_special_tokens=_default(body.skip_special_tokens, True),
    )


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise RequestError(f"{rule}, got {got}.")


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _spread(value: T | list[T], count: int, name: str) -> list[T]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return value


def _rids(rid: str | list[str] | None, count: int, defaults: Defaults) -> list[str]:
    if rid is None:
        return [defaults.next_rid() for _ in range(count)]
    if isinstance(rid, str):
        return [rid] if count == 1 else [f"{rid}_{number}" for number in range(count)]
    if len(rid) != count:
        raise RequestError(f"rid has {len(rid)} entries for {count} sequences.")
    if len(set(rid)) != count:
        raise RequestError("Duplicate request IDs detected within the request.")
    return rid


def answer(sequence: RunningSequence, text: str | None) -> dict[str, Any]:
    """One sequence in SGLang's form; no text without a tokenizer."""
    meta: dict[str, Any] = {
        "id": sequence.rid,
        "finish_reason": sequence.finish_reason,
        "prompt_tokens": len(sequence.prompt_ids),
        "weight_version": sequence.spans[-1].version,
        "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in sequence.spans],
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": sequence.cached_tokens,
        "e2e_latency": sequence.finished - sequence.arrived,
    }
    if sequence.with_log_probs:
        meta["output_token_logprobs"] = [
            (log_prob, token, None) for log_prob, token in zip(sequence.log_probs, sequence.output_ids, strict=True)
        ]
        meta["output_token_logprobs_length"] = len(sequence.output_ids)
        scored = () if sequence.logprob_start is None else sequence.prompt_ids[sequence.logprob_start :]
        pairs = zip(sequence.input_log_probs, scored, strict=True)
        meta["input_token_logprobs"] = [(log_prob, token, None) for log_prob, token in pairs]
        if sequence.top_logprobs:
            meta["output_top_logprobs"] = [
                [(log_prob, token, None) for log_prob, token in entries] for entries in sequence.top
            ]
    result: dict[str, Any] = {} if text is None else {"text": text}
    return result | {"output_ids": sequence.output_ids, "meta_info": meta}
