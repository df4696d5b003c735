import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.batching.packing import pack
from recipe.batching.schedule import schedule
from recipe.plan.flops import SequenceCost

pytestmark = pytest.mark.smoke

COST = SequenceCost(linear=1.0, quadratic=0.001)


@st.composite
def batches(draw):
    ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    return draw(st.lists(st.integers(1, 400), min_size=ranks * per_rank, max_size=ranks * per_rank)), ranks


@given(batches(), st.integers(1, 500), st.sampled_from([None, COST]))
def test_dynamic_microbatches(batch, max_tokens, cost):
    lengths, ranks = batch
    plan = schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens, cost=cost)
    samples = [list(itertools.chain(*microbatches)) for microbatches in plan]
    assert sorted(itertools.chain(*samples)) == list(range(len(lengths)))
    assert {len(own) for own in samples} == {len(lengths) // ranks}
    assert len({len(microbatches) for microbatches in plan}) == 1
    for microbatch in itertools.chain(*plan):
        assert len(microbatch) == 1 or 0 < sum(lengths[i] for i in microbatch) <= max_tokens
    for microbatches in plan:
        tokens = [sum(lengths[i] for i in microbatch) for microbatch in microbatches]
        assert tokens == sorted(tokens, reverse=True)
    assert plan == schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens, cost=cost)


@given(batches(), st.integers(1, 500))
def test_there_are_no_more_microbatches_than_the_fullest_rank_needs(batch, max_tokens):
    lengths, ranks = batch
    plan = schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens)
    needed = [len(pack([lengths[i] for i in itertools.chain(*microbatches)], max_tokens)) for microbatches in plan]
    assert len(plan[0]) == max(needed)


@given(batches(), st.integers(1, 500), st.integers(1, 4))
def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages(batch, max_tokens, stages):
    lengths, ranks = batch
    lengths = lengths * stages
    plan = schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens, count_multiple=stages)
    least = len(schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens)[0])
    assert {len(microbatches) for microbatches in plan} == {-(-least // stages) * stages}
    assert sorted(i for microbatches in plan for pack in microbatches for i in pack) == list(range(len(lengths)))


def test_fixed_microbatches_keep_the_order_of_samples():
    plan = schedule([1] * 8, data_parallel_size=2, micro_batch_size=2)
    assert plan == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_balancing_evens_out_the_cost_of_ranks():
    draw = random.Random(0)
    lengths = [min(int(draw.lognormvariate(6, 1)), 8192) for _ in range(256)]

    def imbalance(cost):
        plan = schedule(lengths, data_parallel_size=8, max_tokens=8192, cost=cost)
        costs = [sum(COST(lengths[i]) for i in itertools.chain(*microbatches)) for microbatches in plan]
        return max(costs) / (sum(costs) / 8) - 1

    assert imbalance(COST) <= 0.001 < 0.1 < imbalance(None)


def test_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="7 samples do not divide evenly among 2"):
        schedule([1] * 7, data_parallel_size=2)
    with pytest.raises(ValueError, match="3 samples of a rank do not divide evenly into microbatches of 2"):
        schedule([1] * 6, data_parallel_size=2, micro_batch_size=2)
    with pytest.raises(ValueError, match="3 samples of a rank do not divide evenly by 2"):
        schedule([1] * 6, data_parallel_size=2, max_tokens=10, count_multiple=2)


def test_cost_is_six_flops_a_parameter_and_half_the_square_of_attention():
    cost = SequenceCost.of_transformer(active_parameters=10, num_layers=2, num_heads=3, qk_head_dim=4, v_head_dim=5)
    scores_and_sums = 2 * 2 * 3 * (4 + 5) * 7**2 / 2
    assert cost(7) == 3 * (2 * 10 * 7 + scores_and_sums)
