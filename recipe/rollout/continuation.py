"""Responses that are made in two pieces. What an engine continues is a prompt to it, so it cannot see a stop string
that begins in the first piece and ends in the second, nor a character whose bytes the border divides."""

from collections.abc import Callable, Sequence

from recipe.rollout.sample import FinishReason, Sample

Decode = Callable[[Sequence[int]], str]
"""Tokens to text, special tokens included."""


def rejoin(sample: Sample, border: int, stop: Sequence[str], decode: Decode) -> None:
    """Makes a response that was continued after its first `border` tokens what it is in one piece: it ends with the
    first token that completes a stop string, and when it is finished its text is that of all its tokens."""
    found = _spanning_stop(sample.response_ids, border, stop, decode)
    if found is not None:
        length, sample.matched = found
        sample.cut(length)
        sample.finish_reason = FinishReason.STOP
    if sample.is_finished:
        sample.response = _text(sample, decode)


def stop_window(stop: Sequence[str]) -> int:
    """The newest tokens in whose text stop strings are looked for: a token has at least a byte of one, and the first
    may begin before it."""
    return max(len(string.encode()) for string in stop) + 1


def _spanning_stop(ids: Sequence[int], border: int, stop: Sequence[str], decode: Decode) -> tuple[int, str] | None:
    """Where the first stop string over the border is complete, in tokens."""
    if not stop:
        return None
    window = stop_window(stop)
    for length in range(border + 1, min(len(ids), border + window - 1) + 1):
        text = decode(ids[max(0, length - window) : length])
        matched = next((string for string in stop if string in text), None)
        if matched is not None:
            return length, matched
    return None


def _text(sample: Sample, decode: Decode) -> str:
    if isinstance(sample.matched, int):
        return decode(sample.response_ids[:-1])
    text = decode(sample.response_ids)
    return text if sample.matched is None else text.partition(sample.matched)[0]
