"""Reads SGLang's answer to /generate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.messages import RoutedExperts
from recipe.sampling.errors import EngineAnswerError
from recipe.sampling.routing import RouterShape, read_routed_experts
from recipe.sampling.sample import FinishReason
from recipe.system.errors import shortened


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """New tokens of one sample; the three lists have one length."""

    ids: list[int]
    log_probs: list[float]
    versions: list[str]
    finish_reason: FinishReason
    matched: int | str | None
    """The end token or stop string that was found."""
    text: str
    accepted_drafts: Sequence[int] = ()
    """Steps by the number of draft tokens that were accepted, from 0; empty where nothing was drafted."""
    routed_experts: RoutedExperts | None = None
    """[prompt and response - 1, M, K] where all tokens but the last were taken; None where nobody asked, or the engine
    ended before it could tell."""


def read_samples(
    answer: object, lengths: Sequence[int], vocab_size: int | None, routers: RouterShape | None = None
) -> list[SampleAnswer]:
    """SGLang's answer to a batch of inputs of these lengths, in tokens; `routers`: it was asked for the experts that
    these took. Raises EngineAnswerError if it is not one, or has tokens outside the vocabulary (None: of any size)."""
    if not isinstance(answer, list):
        raise EngineAnswerError("the engine's answer is no list of samples")
    if len(answer) != len(lengths):
        raise EngineAnswerError(f"the engine answered {len(answer)} of {len(lengths)} samples")
    samples = [read_sample(item, routers) for item in answer]
    for sample, length in zip(samples, lengths, strict=True):
        expected = length + len(sample.ids) - 1
        if sample.routed_experts is not None and len(sample.routed_experts) != expected:
            told = f"of {len(sample.routed_experts)} tokens, not of {expected}"
            raise EngineAnswerError(f"the engine tells the routed experts {told}: it has lost some")
    largest = max((max(sample.ids, default=0) for sample in samples), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise EngineAnswerError(f"the engine answered the token id {largest}, outside the vocabulary of {vocab_size}")
    return samples


def read_sample(answer: Mapping[str, Any], routers: RouterShape | None = None) -> SampleAnswer:
    """One item of SGLang's answer. Raises EngineAnswerError if it lacks what a sample needs."""
    try:
        meta = answer["meta_info"]
        finish_reason = FinishReason(meta["finish_reason"]["type"])
        if finish_reason is FinishReason.ABORT:
            return _aborted(answer, routers)
        ids = _token_ids(answer["output_ids"])
        log_probs = _log_probs(meta["output_token_logprobs"])
        matched = meta["finish_reason"].get("matched")
        versions = _token_versions(meta, len(ids))
        text = answer.get("text", "")
        if not isinstance(text, str):
            raise TypeError(f"the text is {text!r}")
        routed = None if routers is None else read_routed_experts(meta.get("routed_experts"), routers)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise EngineAnswerError(f"the engine's answer is not SGLang's: {type(error).__name__}: {error}") from error
    if len(log_probs) != len(ids):
        raise EngineAnswerError(f"the engine answered {len(ids)} tokens with {len(log_probs)} log-probs")
    drafts = meta.get("spec_correct_drafts_histogram") or ()
    return SampleAnswer(ids, log_probs, versions, finish_reason, matched, text, drafts, routed)


def _aborted(answer: Mapping[str, Any], routers: RouterShape | None) -> SampleAnswer:
    """What an engine made before it was told to stop: the tokens whose log-probs it told. It tells neither these nor a
    version of what it aborted before the prompt was read, and may tell none of what waited to go on."""
    meta = answer["meta_info"]
    log_probs = _log_probs(meta.get("output_token_logprobs") or ())
    ids = _token_ids(answer.get("output_ids") or ())
    text = answer.get("text", "") if len(log_probs) == len(ids) else ""
    known = min(len(ids), len(log_probs))
    versions = _token_versions(meta, known) if known else []
    drafts = meta.get("spec_correct_drafts_histogram") or ()
    routed = None
    if routers is not None and known and known == len(ids) and "routed_experts" in meta:
        routed = read_routed_experts(meta["routed_experts"], routers)
    return SampleAnswer(ids[:known], log_probs[:known], versions, FinishReason.ABORT, None, text, drafts, routed)


def _token_ids(values: Sequence[object]) -> list[int]:
    """[N] token ids. Raises TypeError or ValueError if one is none; the vocabulary is the caller's to know."""
    ids = []
    for value in values:
        if type(value) is not int:
            raise TypeError(f"a token id is {shortened(value)}")
        if value < 0:
            raise ValueError(f"a token id is {value}")
        ids.append(value)
    return ids


def _log_probs(entries: Sequence[Sequence[object]]) -> list[float]:
    """[N] log-probs, from entries that begin with them. Raises TypeError or ValueError if one is none."""
    found = []
    for entry in entries:
        value = entry[0]
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise TypeError(f"a log-prob is {shortened(value)}")
        if not math.isfinite(value):
            raise ValueError(f"a log-prob is {value}")
        found.append(float(value))
    return found


def _token_versions(meta: Mapping[str, Any], count: int) -> list[str]:
    """The weight version of each token: from SGLang's spans, or one for all where a server knows no spans."""
    versions: list[object] = [meta["weight_version"]] * count
    for span in meta.get("weight_versions", ()):
        start, end = span["start"], min(span["end"], count)
        if not 0 <= start <= end:
            raise ValueError(f"a span of weight versions goes from {start} to {span['end']} in {count} tokens")
        versions[start:end] = [span["version"]] * (end - start)
    for version in versions:
        if not isinstance(version, str):
            raise TypeError(f"a weight version is {shortened(version)}")
    return list(map(str, versions))
