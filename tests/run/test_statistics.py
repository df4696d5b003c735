"""Estimators against exact enumeration, identities and simulation."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betaincinv

from recipe.run.statistics import (
    Difference,
    Estimate,
    bootstrap_share,
    clustered_mean,
    clustered_share,
    majority_at_k,
    paired_difference,
    pass_at_k,
    powers_of_two,
    smallest_gain,
    t_quantile,
)

RUNS, PROBLEMS, SAMPLES = 2000, 30, 16


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (14, 2.1448), (29, 2.0452), (120, 1.9799)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


@given(st.integers(1, 8), st.data())
@settings(max_examples=40)
def test_pass_at_k_is_the_mean_over_all_choices(samples: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    outcomes = [True] * correct + [False] * (samples - correct)
    choices = [any(choice) for choice in combinations(outcomes, k)]
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


@given(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 3), st.data())
@settings(max_examples=80)
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


def test_for_problems_solved_always_or_never_it_lies_between_jeffreys_and_clopper_pearson() -> None:
    for solved in range(1, PROBLEMS):
        found = clustered_share([1.0] * solved + [0.0] * (PROBLEMS - solved))
        missed = PROBLEMS - solved
        assert betaincinv(solved, missed + 1, 0.025) < found.low < betaincinv(solved + 0.5, missed + 0.5, 0.025)
        assert betaincinv(solved + 0.5, missed + 0.5, 0.975) < found.high < betaincinv(solved + 1, missed, 0.975)


def test_bootstrap_and_closed_form_agree() -> None:
    draw = np.random.default_rng(3)
    for shape in ((1.0, 1.0), (2.0, 0.5), (0.5, 0.5), (0.1, 0.01), (8.0, 1.0)):
        for _ in range(5):
            values = list(draw.binomial(SAMPLES, draw.beta(*shape, size=PROBLEMS)) / SAMPLES)
            closed, resampled = clustered_share(values), bootstrap_share(values, seed=1)
            assert closed.mean == resampled.mean
            width = closed.high - closed.low
            assert abs(closed.low - resampled.low) < 0.1 * width
            assert abs(closed.high - resampled.high) < 0.1 * width


@given(st.lists(st.integers(0, SAMPLES), min_size=2, max_size=40), st.data())
@settings(max_examples=200)
def test_a_better_problem_lowers_neither_bound(correct: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(correct) - 1))
    better = [*correct]
    better[place] = data.draw(st.integers(correct[place], SAMPLES))
    worse, better_ = (bootstrap_share([count / SAMPLES for count in counts], seed=1) for counts in (correct, better))
    assert worse.low <= better_.low
    assert worse.high <= better_.high


def test_bounds_rise_with_every_sample_that_is_solved() -> None:
    lows, highs = [], []
    for solved in range(PROBLEMS * SAMPLES + 1):
        whole, rest = divmod(solved, SAMPLES)
        found = clustered_share(([1.0] * whole + [rest / SAMPLES] + [0.0] * PROBLEMS)[:PROBLEMS])
        assert found.low <= found.mean <= found.high
        assert found.high - found.low > 0.08
        lows.append(found.low)
        highs.append(found.high)
    assert lows == sorted(lows)
    assert highs == sorted(highs)


Difficulties = Callable[[np.random.Generator], np.ndarray]


def beta(*shape: float) -> tuple[Difficulties, float]:
    """[RUNS, PROBLEMS] difficulties of a beta distribution, and their mean in the population."""
    return lambda draw: draw.beta(*shape, size=(RUNS, PROBLEMS)), shape[0] / sum(shape)


def two_kinds(easy: float, hard: float, share: float) -> tuple[Difficulties, float]:
    """Such a share of the problems is hard."""
    mean = easy + share * (hard - easy)
    return lambda draw: np.where(draw.random((RUNS, PROBLEMS)) < share, hard, easy), mean


def coverage(interval: Callable[[list[float]], Estimate], population: tuple[Difficulties, float]) -> float:
    """The share of simulated runs whose interval holds the mean of the population of problems."""
    draw = np.random.default_rng(11)
    difficulties, mean = population
    held = 0
    for row in difficulties(draw):
        found = interval(list(draw.binomial(SAMPLES, row) / SAMPLES))
        held += found.low <= mean <= found.high
    return held / RUNS


@pytest.mark.parametrize("shape", [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0), (2.0, 0.5), (0.5, 2.0), (0.1, 0.1)])
def test_coverage(shape: tuple[float, float]) -> None:
    assert 0.93 <= coverage(clustered_share, beta(*shape)) <= 0.97


@pytest.mark.parametrize(
    "population",
    [
        *(beta(0.1, 0.01), beta(0.05, 0.005), beta(0.3, 0.03), beta(1.0, 0.05), beta(0.01, 0.1)),
        *(two_kinds(1.0, 0.0, 0.03), two_kinds(1.0, 0.0, 0.1), two_kinds(1.0, 0.0, 0.2), two_kinds(0.99, 0.02, 0.1)),
        *(beta(3.0, 0.3), beta(8.0, 1.0), beta(20.0, 1.0), beta(8.0, 8.0)),
    ],
)
def test_coverage_where_nearly_all_problems_are_alike(population: tuple[Difficulties, float]) -> None:
    """Solved always or never, so counted by whole problems: coverage jumps with the share of unlike ones (93.2% where
    it is a tenth, 98.8% where it is 3%). Or all of middling difficulty, where nothing need be allowed for an unseen
    problem. 2,000 runs may miss the true coverage by a hundredth."""
    assert 0.92 <= coverage(clustered_share, population) <= 0.995


def test_exact_coverage_of_problems_solved_always_or_never() -> None:
    """Over all shares of them."""
    found = [clustered_share([1.0] * solved + [0.0] * (PROBLEMS - solved)) for solved in range(PROBLEMS + 1)]
    covered = []
    for share in np.linspace(0.005, 0.995, 199):
        chances = [
            math.comb(PROBLEMS, solved) * share**solved * (1 - share) ** (PROBLEMS - solved) for solved in range(31)
        ]
        held = [chance for chance, one in zip(chances, found, strict=True) if one.low <= share <= one.high]
        covered.append(sum(held))
    assert min(covered) > 0.92
    assert 0.95 < sum(covered) / len(covered) < 0.97


def test_samples_that_count_as_independent_would_not_cover() -> None:
    def unclustered(values: list[float]) -> Estimate:
        mean = float(np.mean(values))
        half_width = 1.96 * math.sqrt(mean * (1 - mean) / (PROBLEMS * SAMPLES))
        return Estimate(mean, mean - half_width, mean + half_width)

    assert coverage(unclustered, beta(1.0, 1.0)) < 0.7


def test_intervals_stay_within_what_is_possible() -> None:
    assert clustered_share([1.0] * 30) == Estimate(1.0, pytest.approx(0.9084, abs=1e-4), 1.0)
    assert clustered_share([0.0] * 30) == Estimate(0.0, 0.0, pytest.approx(0.0916, abs=1e-4))
    extreme = clustered_share([0.0] * 999 + [1e-4])
    assert 0 <= extreme.low < extreme.mean < extreme.high <= 1
    for value in (0.0, 0.5, 1.0):
        alone = clustered_share([value])
        assert 0 <= alone.low <= value <= alone.high <= 1
        assert alone.high - alone.low > 0.8
    assert clustered_mean([-3.0]) == Estimate(-3.0, -math.inf, math.inf)


def test_a_paired_difference_by_hand() -> None:
    found = paired_difference([0.9, 0.5, 0.7, 0.2], [0.8, 0.3, 0.7, 0.3], (1000, 1000), seed=1)
    assert found.estimate.mean == pytest.approx(0.05)
    error = math.sqrt(((0.05**2) + (0.15**2) + (0.05**2) + (0.15**2)) / 3) / 2
    assert found.estimate.high - found.estimate.mean == pytest.approx(3.18245 * error, rel=1e-4)
    ratio = 0.05 / error / math.sqrt(3)
    tail = 0.5 - (ratio / (1 + ratio**2) + math.atan(ratio)) / math.pi  # Student's, of 3 degrees, in closed form
    assert found.p_value == pytest.approx(2 * tail)
    sums = [abs(0.1 * a + 0.2 * b + 0.0 * c - 0.1 * d) for a, b, c, d in product((-1, 1), repeat=4)]
    assert found.p_value_signs == sum(value >= 0.2 - 1e-9 for value in sums) / 16


def test_equal_results_do_not_differ() -> None:
    found = paired_difference([0.5, 0.2, 1.0], [0.5, 0.2, 1.0], (10, 10), seed=1)
    assert (found.estimate.mean, found.p_value, found.p_value_signs) == (0, 1, 1)
    assert found.estimate.low < -0.1
    assert found.estimate.high > 0.1


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.25), (1.0, 0.0), (1.0, 15 / 16), (0.0, 0.0)])
def test_equal_differences_are_not_certain(a: float, b: float) -> None:
    found = paired_difference([a] * 10, [b] * 10, (SAMPLES, SAMPLES), seed=1)
    assert found.p_value > 0
    assert -1 <= found.estimate.low < found.estimate.high <= 1
    assert found.estimate.high - found.estimate.low > 0.01


def test_one_problem_says_nothing_of_others() -> None:
    found = paired_difference([1.0], [0.0], (SAMPLES, SAMPLES), seed=1)
    assert found == Difference(Estimate(1.0, -1.0, 1.0), 1.0, 1.0)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    draw = np.random.default_rng(2)
    small = [0, 0]
    for _ in range(400):
        difficulties = draw.beta(1, 1, size=12)
        left, right = (draw.binomial(SAMPLES, difficulties) / SAMPLES for _ in range(2))
        found = paired_difference(list(left), list(right), (SAMPLES, SAMPLES), seed=1)
        small[0] += found.p_value < 0.1
        small[1] += found.p_value_signs < 0.1
    assert all(24 <= count <= 60 for count in small), small


def test_random_sign_flips_agree_with_all_of_them() -> None:
    draw = np.random.default_rng(4)
    differences = list(draw.normal(0.03, 0.1, size=16))
    exact = paired_difference(differences, [0.0] * 16, (8, 8), seed=1).p_value_signs
    # A problem without a difference changes nothing, but makes 17, which are too many to flip in all ways.
    drawn = paired_difference([*differences, 0.0], [0.0] * 17, (8, 8), seed=1).p_value_signs
    assert drawn == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("problems", "samples"), [(30, 16), (200, 4), (12, 8)])
def test_the_smallest_gain_is_found_four_times_of_five(problems: int, samples: int) -> None:
    """By drawing: every problem is solved half of the time less, and then half of the time more, than the middle."""
    gain, draws = smallest_gain(problems, samples), 4000
    draw = np.random.default_rng(7)
    before, after = (draw.binomial(samples, 0.5 + half, (draws, problems)) / samples for half in (-gain / 2, gain / 2))
    differences = after - before
    error = differences.std(axis=1, ddof=1) / problems**0.5
    found = differences.mean(axis=1) > t_quantile(problems - 1) * error
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_one_problem_shows_no_gain() -> None:
    assert smallest_gain(1, 100) == math.inf
