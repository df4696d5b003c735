import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.batching.packing import pack, pack_to_count

lengths_and_cap = st.tuples(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 250))


def assert_valid(packs, lengths, max_tokens):
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    for members in packs:
        assert members == sorted(members)
        assert len(members) == 1 or 0 < sum(lengths[i] for i in members) <= max_tokens


@given(lengths_and_cap)
def test_packs_hold_every_sample_once_and_are_capped(case):
    lengths, max_tokens = case
    assert_valid(pack(lengths, max_tokens), lengths, max_tokens)


@given(lengths_and_cap)
def test_no_two_packs_could_be_one(case):
    lengths, max_tokens = case
    tokens = sorted(sum(lengths[i] for i in members) for members in pack(lengths, max_tokens))
    assert len(tokens) < 2 or tokens[0] + tokens[1] > max_tokens


@given(lengths_and_cap, st.data())
def test_any_possible_number_of_packs_can_be_had(case, data):
    lengths, max_tokens = case
    fewest = len(pack(lengths, max_tokens))
    count = data.draw(st.integers(fewest, len(lengths)))
    packs = pack_to_count(lengths, max_tokens, count)
    assert len(packs) == count
    assert_valid(packs, lengths, max_tokens)
    tokens = [sum(lengths[i] for i in members) for members in packs]
    assert tokens == sorted(tokens, reverse=True)


def test_an_oversize_sample_is_alone():
    assert [1] in pack([10, 5000, 10], 100)


def test_fills_packs_that_a_greedy_pass_in_order_would_not():
    assert len(pack([5, 7, 5, 3], 10)) == 2


def test_is_nearly_as_good_as_can_be_on_a_long_tailed_distribution():
    draw = random.Random(0)
    lengths = [min(int(draw.lognormvariate(7, 1)), 8192) for _ in range(20_000)]
    started = time.thread_time()
    packs = pack(lengths, 8192)
    assert time.thread_time() - started < 2
    assert len(packs) <= 1.01 * sum(lengths) / 8192 + 1


@pytest.mark.parametrize("count", [1, 4])
def test_an_impossible_number_of_packs_is_an_error(count):
    with pytest.raises(ValueError, match=f"3 sequences that need 2 packs cannot be put into {count}"):
        pack_to_count([60, 60, 30], 100, count)
