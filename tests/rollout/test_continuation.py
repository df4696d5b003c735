"""Stop strings over the border of two pieces, whatever tokens they are spelled in."""

from collections.abc import Sequence

import pytest
from rollout_support import make_prompt

from recipe.generation.continuation import rejoin, text_of_turn
from recipe.sampling.sample import FinishReason, Sample


def decode(ids: Sequence[int]) -> str:
    """Of a tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def sample_of(text: str) -> Sample:
    sample = Sample(0, 0, make_prompt(0, (1,)))
    ids = list(text.encode())
    sample.append_model(ids, [-1.0] * len(ids), ["1"] * len(ids))
    sample.finish_reason = FinishReason.LENGTH
    return sample


STOP = "\u7d42\u308f\u308a"


@pytest.mark.parametrize("border", range(6, 6 + len(STOP.encode()) - 1))
def test_a_stop_string_of_many_bytes_is_found_wherever_the_border_divides_it(border: int) -> None:
    before = "hello"
    sample = sample_of(before + STOP + " and more")
    rejoin(sample, border, ("never", STOP), decode)
    assert (sample.finish_reason, sample.matched) == (FinishReason.STOP, STOP)
    assert text_of_turn(sample, decode) == before
    assert sample.response_length == len((before + STOP).encode())


def test_what_stops_nowhere_is_left_as_it_is() -> None:
    sample = sample_of("hello, world")
    rejoin(sample, 5, (STOP,), decode)
    assert (sample.finish_reason, text_of_turn(sample, decode)) == (FinishReason.LENGTH, "hello, world")
