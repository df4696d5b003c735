"""Estimators against exact enumeration, identities and simulation."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    clustered_mean,
    clustered_share,
    majority_at_k,
    paired_difference,
    pass_at_k,
    powers_of_two,
    standard_error,
    t_quantile,
    t_tail,
)

RUNS, PROBLEMS, SAMPLES = 2000, 30, 16


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (14, 2.1448), (29, 2.0452), (120, 1.9799)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)
    assert t_tail(quantile, freedom) == pytest.approx(0.025, abs=1e-5)


@given(st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=40)
def test_pass_at_k_is_the_mean_over_all_choices(samples: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    outcomes = [True] * correct + [False] * (samples - correct)
    choices = [any(choice) for choice in combinations(outcomes, k)]
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


@given(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=80)
def test_majority_at_k_is_the_mean_over_all_choices(
    correct: int, others: list[int], silent: int, data: st.DataObject
) -> None:
    answers = ["right"] * correct + [f"other {n}" for n, size in enumerate(others) for _ in range(size)]
    answers += [""] * silent
    if not answers:
        return
    k = data.draw(st.integers(1, len(answers)))

    def vote(choice: tuple[str, ...]) -> float:
        votes = Counter(answer for answer in choice if answer)
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        return ("right" in first) / max(1, len(first))

    values = [vote(choice) for choice in combinations(answers, k)]
    assert majority_at_k(correct, others, silent, k) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_with_one_sample_all_scores_are_one() -> None:
    for correct in range(9):
        assert pass_at_k(8, correct, 1) == pytest.approx(correct / 8)
        assert majority_at_k(correct, [8 - correct], 0, 1) == pytest.approx(correct / 8)


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    values = [0.0, 0.25, 0.5, 1.0, 1.0]
    means = [sum(choice) / 5 for choice in product(values, repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = bootstrap_mean(values, seed=1)
    assert found.mean == 0.55
    assert (found.low, found.high) == (pytest.approx(low, abs=0.051), pytest.approx(high, abs=0.051))
    assert np.std(means) == pytest.approx(standard_error(values) * math.sqrt(4 / 5))


def test_bootstrap_and_closed_form_agree() -> None:
    draw = np.random.default_rng(3)
    for shape in ((1.0, 1.0), (2.0, 0.5), (0.5, 0.5)):
        values = list(draw.binomial(SAMPLES, draw.beta(*shape, size=PROBLEMS)) / SAMPLES)
        closed, resampled = clustered_share(values), bootstrap_mean(values, seed=1)
        assert closed.mean == resampled.mean
        width = closed.high - closed.low
        assert resampled.high - resampled.low == pytest.approx(width, rel=0.1)
        assert abs(closed.low + closed.high - resampled.low - resampled.high) / 2 < 0.06 * width


def coverage(interval: Callable[[list[float]], Estimate], shape: tuple[float, float]) -> float:
    """The share of simulated runs whose interval holds the mean of the population of problems."""
    draw = np.random.default_rng(11)
    mean = shape[0] / (shape[0] + shape[1])
    held = 0
    for difficulties in draw.beta(*shape, size=(RUNS, PROBLEMS)):
        found = interval(list(draw.binomial(SAMPLES, difficulties) / SAMPLES))
        held += found.low <= mean <= found.high
    return held / RUNS


@pytest.mark.parametrize("shape", [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0), (2.0, 0.5), (0.5, 2.0), (3.0, 0.3), (8.0, 1.0)])
def test_coverage(shape: tuple[float, float]) -> None:
    """Also where most problems are solved always, or hardly any ever."""
    assert 0.93 <= coverage(clustered_share, shape) <= 0.97


def test_samples_that_count_as_independent_would_not_cover() -> None:
    def unclustered(values: list[float]) -> Estimate:
        mean = float(np.mean(values))
        half_width = 1.96 * math.sqrt(mean * (1 - mean) / (PROBLEMS * SAMPLES))
        return Estimate(mean, mean - half_width, mean + half_width)

    assert coverage(unclustered, (1.0, 1.0)) < 0.7


def test_intervals_stay_within_what_is_possible() -> None:
    assert clustered_share([1.0] * 30) == Estimate(1.0, pytest.approx(0.025 ** (1 / 30)), 1.0)
    assert clustered_share([0.0] * 30) == Estimate(0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 30)))
    nearly = clustered_share([1.0] * 29 + [15 / 16])
    assert 0.95 < nearly.low < nearly.mean < nearly.high < 1
    extreme = clustered_share([0.0] * 999 + [1e-4])
    assert 0 <= extreme.low < extreme.mean < extreme.high <= 1
    assert clustered_share([0.5]) == Estimate(0.5, 0.0, 1.0)
    assert clustered_mean([-3.0]) == Estimate(-3.0, -math.inf, math.inf)


def test_a_paired_difference_by_hand() -> None:
    found = paired_difference([0.9, 0.5, 0.7, 0.2], [0.8, 0.3, 0.7, 0.3], seed=1)
    assert found.estimate.mean == pytest.approx(0.05)
    error = math.sqrt(((0.05**2) + (0.15**2) + (0.05**2) + (0.15**2)) / 3) / 2
    assert found.estimate.high - found.estimate.mean == pytest.approx(3.18245 * error, rel=1e-4)
    assert found.p_value == pytest.approx(2 * t_tail(0.05 / error, 3))
    sums = [abs(0.1 * a + 0.2 * b + 0.0 * c - 0.1 * d) for a, b, c, d in product((-1, 1), repeat=4)]
    assert found.p_value_signs == sum(value >= 0.2 - 1e-9 for value in sums) / 16


def test_equal_results_do_not_differ() -> None:
    found = paired_difference([0.5, 0.2, 1.0], [0.5, 0.2, 1.0], seed=1)
    assert (found.estimate.mean, found.p_value, found.p_value_signs) == (0, 1, 1)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    draw = np.random.default_rng(2)
    small = [0, 0]
    for _ in range(400):
        difficulties = draw.beta(1, 1, size=12)
        left, right = (draw.binomial(SAMPLES, difficulties) / SAMPLES for _ in range(2))
        found = paired_difference(list(left), list(right), seed=1)
        small[0] += found.p_value < 0.1
        small[1] += found.p_value_signs < 0.1
    assert all(24 <= count <= 60 for count in small), small


def test_random_sign_flips_agree_with_all_of_them() -> None:
    draw = np.random.default_rng(4)
    differences = list(draw.normal(0.03, 0.1, size=16))
    exact = paired_difference(differences, [0.0] * 16, seed=1).p_value_signs
    # A problem without a difference changes nothing, but makes 17, which are too many to flip in all ways.
    drawn = paired_difference([*differences, 0.0], [0.0] * 17, seed=1).p_value_signs
    assert drawn == pytest.approx(exact, abs=0.01)
