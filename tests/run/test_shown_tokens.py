"""Samples token by token: their pieces are their text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.run.shown_tokens import ShownTokens, pieces_of, read_tokens, write_tokens


def bytes_as_tokens(ids: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text(st.characters(codec="utf-8")))
def test_pieces_of_characters_that_take_several_tokens_make_up_the_text(text: str) -> None:
    ids = list(text.encode())
    pieces = pieces_of(ids, bytes_as_tokens)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.binary())
def test_bytes_that_are_no_text_are_shown_all_the_same(data: bytes) -> None:
    assert len(pieces_of(list(data), bytes_as_tokens)) == len(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first = ShownTokens(line=0, pieces=["a"], log_probs=[-0.5], advantages=[1.0], trainer_log_probs=[-0.25])
    second = ShownTokens(line=5, pieces=["\u00e9\u2028"], log_probs=[-1 / 3], advantages=[0.1], trainer_log_probs=None)
    write_tokens(tmp_path, 7, [first, second])
    assert read_tokens(tmp_path, 7, 0) == first
    again = read_tokens(tmp_path, 7, 5)
    assert again is not None
    assert again.log_probs == pytest.approx(second.log_probs, abs=1e-4)
    assert again.trainer_log_probs is None
    assert read_tokens(tmp_path, 7, 1) is None
    assert read_tokens(tmp_path, 8, 0) is None
