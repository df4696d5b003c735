"""Reads SGLang's answer to /generate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.rollout.errors import EngineAnswerError
from recipe.rollout.sample import FinishReason


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


def read_samples(answer: object, count: int) -> list[SampleAnswer]:
    """SGLang's answer to a batch of `count`. Raises EngineAnswerError if it is not one."""
    if not isinstance(answer, list):
        raise EngineAnswerError("the engine's answer is no list of samples")
    if len(answer) != count:
        raise EngineAnswerError(f"the engine answered {len(answer)} of {count} samples")
    return [read_sample(item) for item in answer]


def read_sample(answer: Mapping[str, Any]) -> SampleAnswer:
    """One item of SGLang's answer. Raises EngineAnswerError if it lacks what a sample needs."""
    try:
        meta = answer["meta_info"]
        finish_reason = FinishReason(meta["finish_reason"]["type"])
        if finish_reason is FinishReason.ABORT:
            return _aborted(answer)
        ids = list(answer["output_ids"])
        log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
        matched = meta["finish_reason"].get("matched")
        versions = _token_versions(meta, len(ids))
        text = answer.get("text", "")
        if not isinstance(text, str):
            raise TypeError(f"the text is {text!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise EngineAnswerError(f"the engine's answer is not SGLang's: {error!r}") from error
    if len(log_probs) != len(ids):
        raise EngineAnswerError(f"the engine answered {len(ids)} tokens with {len(log_probs)} log-probs")
    drafts = meta.get("spec_correct_drafts_histogram") or ()
    return SampleAnswer(ids, log_probs, versions, finish_reason, matched, text, drafts)


def _aborted(answer: Mapping[str, Any]) -> SampleAnswer:
    """What an engine made before it was told to stop: the tokens whose log-probs it told. It tells neither these nor a
    version of what it aborted before the prompt was read, and may tell none of what waited to go on."""
    meta = answer["meta_info"]
    log_probs = [entry[0] for entry in meta.get("output_token_logprobs") or ()]
    ids = list(answer.get("output_ids") or ())
    text = answer.get("text", "") if len(log_probs) == len(ids) else ""
    known = min(len(ids), len(log_probs))
    versions = _token_versions(meta, known) if known else []
    drafts = meta.get("spec_correct_drafts_histogram") or ()
    return SampleAnswer(ids[:known], log_probs[:known], versions, FinishReason.ABORT, None, text, drafts)


def _token_versions(meta: Mapping[str, Any], count: int) -> list[str]:
    """The weight version of each token: from SGLang's spans, or one for all where a server knows no spans."""
    versions: list[str] = [meta["weight_version"]] * count
    for span in meta.get("weight_versions", ()):
        start, end = span["start"], min(span["end"], count)
        versions[start:end] = [span["version"]] * (end - start)
    return versions
