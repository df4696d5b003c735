import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.batching.partition import partition_balanced

costs_and_count = st.tuples(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 12))


@given(costs_and_count)
def test_every_index_is_in_exactly_one_part(case):
    costs, count = case
    parts = partition_balanced(costs, count, equal_size=False)
    assert len(parts) == count
    assert sorted(itertools.chain(*parts)) == list(range(len(costs)))
    assert sum(not part for part in parts) == max(0, count - len(costs))
    assert all(part == sorted(part) for part in parts)


@given(st.integers(1, 8), st.integers(0, 6), st.data())
def test_equal_size_parts_have_equal_sizes(count, size, data):
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=count * size, max_size=count * size))
    parts = partition_balanced(costs, count, equal_size=True)
    assert [len(part) for part in parts] == [size] * count
    assert sorted(itertools.chain(*parts)) == list(range(len(costs)))


@given(costs_and_count)
def test_no_part_exceeds_another_by_more_than_the_largest_cost(case):
    costs, count = case
    sums = [sum(costs[i] for i in part) for part in partition_balanced(costs, count, equal_size=False)]
    assert max(sums) - min(sums) <= max(costs, default=0)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=9))
def test_two_parts_are_close_to_the_best_there_are(costs):
    halves = [sum(chosen) for size in range(len(costs)) for chosen in itertools.combinations(costs, size)]
    best = min(max(half, sum(costs) - half) for half in halves)
    found = max(sum(costs[i] for i in part) for part in partition_balanced(costs, 2, equal_size=False))
    assert best <= found <= 7 / 6 * best


def test_the_textbook_example_of_the_differencing_method():
    costs = [8, 7, 6, 5, 4]
    parts = partition_balanced(costs, 2, equal_size=False)
    assert sorted(sum(costs[i] for i in part) for part in parts) == [14, 16]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [8, 32, 64])
def test_long_tailed_costs_are_divided_as_evenly_as_equal_sizes_allow(seed, count):
    draw = random.Random(seed)
    lengths = [min(draw.lognormvariate(6.5, 1), 8192) for _ in range(256)]
    costs = sorted(length + 1e-4 * length**2 for length in lengths)
    parts = partition_balanced(costs, count, equal_size=True)
    with_the_costliest = costs[-1] + sum(costs[: 256 // count - 1])
    assert max(sum(costs[i] for i in part) for part in parts) <= 1.002 * max(sum(costs) / count, with_the_costliest)


def test_eight_thousand_samples_on_a_thousand_ranks_take_no_time():
    draw = random.Random(0)
    costs = [min(draw.lognormvariate(8, 1), 16384) for _ in range(8192)]
    started = time.thread_time()
    parts = partition_balanced(costs, 1024, equal_size=True)
    assert time.thread_time() - started < 2
    sums = [sum(costs[i] for i in part) for part in parts]
    assert max(sums) < 1.01 * sum(sums) / 1024


def test_refuses_what_cannot_be_divided():
    with pytest.raises(ValueError, match="7 samples cannot be divided into 2"):
        partition_balanced([1] * 7, 2, equal_size=True)
    with pytest.raises(ValueError, match="0 parts"):
        partition_balanced([1], 0, equal_size=False)
