"""Responses that are made in two pieces. What an engine continues is a prompt to it, so it cannot see a stop string
that begins in the first piece and ends in the second, nor a character whose bytes the border divides."""

from collections.abc import Callable, Sequence

from recipe.sampling.sample import FinishReason, Sample

Decode = Callable[[Sequence[int]], str]
"""Tokens to text, special tokens included."""


def rejoin(sample: Sample, border: int, stop: Sequence[str], decode: Decode) -> None:
    """Makes the last turn of a response, which was continued after its first `border` tokens, what it is in one piece:
    it ends with the first token that completes a stop string."""
    start = sample.turn_start
    found = _spanning_stop(sample.response_ids[start:], border - start, stop, decode)
    if found is not None:
        length, sample.matched = found
        sample.cut(start + length)
        sample.finish_reason = FinishReason.STOP


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


def text_of_turn(sample: Sample, decode: Decode) -> str:
    """The text of the last turn without what ended it."""
    ids = sample.response_ids[sample.turn_start :]
    if isinstance(sample.matched, int):
        return decode(ids[:-1])
    text = decode(ids)
    return text if sample.matched is None else text.partition(sample.matched)[0]
