"""Estimates from repeated samples of the same problems.

Samples of one problem are not independent, so every interval is over problems: a value is computed for each problem,
and the problems are taken for a sample of those that might have been asked ("clustered by problem"; Miller, "Adding
Error Bars to Evals", arXiv:2411.00640). P is their number.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from mpmath import betainc, findroot

from recipe.seeds import derive

_TAIL = 0.025
_BOOTSTRAP_DRAWS = 10_000
_SIGN_DRAWS = 100_000
_EXACT_SIGNS_UP_TO = 16
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean difference of two sets of values of the same problems."""

    estimate: Estimate
    p_value: float
    """Two-sided, of no difference, by the paired t test."""
    p_value_signs: float
    """The same by flipping the signs of the differences, which assumes no distribution: all 2^P flips for few problems,
    random ones for many."""


def clustered_mean(values: Sequence[float]) -> Estimate:
    """The mean of [P] values of problems, with Student's interval; unbounded from one problem alone."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half_width = t_quantile(len(values) - 1) * standard_error(values)
    return Estimate(mean, mean - half_width, mean + half_width)


def clustered_share(values: Sequence[float]) -> Estimate:
    """As `clustered_mean` of [P] shares between 0 and 1, with the interval taken on the scale of log-odds: it stays
    between 0 and 1, and covers near them, where Student's own does not (the logit interval of Brown, Cai and DasGupta,
    Statistical Science 16(2), 2001, with the clustered standard error).

    Where every problem was solved always, or none ever, the spread says nothing: then it is the exact interval of P
    successes, or none, of P tries.
    """
    count, mean = len(values), statistics.fmean(values)
    if mean < _ROUNDING:
        return Estimate(0.0, 0.0, 1 - _TAIL ** (1 / count))
    if mean > 1 - _ROUNDING:
        return Estimate(1.0, _TAIL ** (1 / count), 1.0)
    if count < 2:
        return Estimate(mean, 0.0, 1.0)
    odds = math.log(mean / (1 - mean))
    half_width = t_quantile(count - 1) * standard_error(values) / (mean * (1 - mean))
    return Estimate(mean, _logistic(odds - half_width), _logistic(odds + half_width))


def bootstrap_mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean of [P] values with the percentile interval of means of P problems drawn with replacement. It is given
    beside the closed form as a check: for 30 problems it is narrower by about a sixteenth."""
    draw = np.random.default_rng(derive(seed, "bootstrap"))
    array = np.asarray(values, dtype=np.float64)
    means = array[draw.integers(len(array), size=(_BOOTSTRAP_DRAWS, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return Estimate(statistics.fmean(values), float(low), float(high))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of [P] values of problems, P at least 2."""
    return statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(left: Sequence[float], right: Sequence[float], seed: int) -> Difference:
    """Left less right, [P] values each, in the same order of problems."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    estimate = clustered_mean(differences)
    error = standard_error(differences) if len(differences) > 1 else math.inf
    if error < _ROUNDING:
        p_value = 1.0 if abs(estimate.mean) < _ROUNDING else 0.0
    else:
        p_value = 2 * t_tail(abs(estimate.mean) / error, max(1, len(differences) - 1))
    return Difference(estimate, p_value, _sign_flip_p_value(np.asarray(differences), seed))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k samples is right, drawn from `samples` of which `correct` are: the unbiased
    estimator of Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, equation 1."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(correct: int, others: Sequence[int], silent: int, k: int) -> float:
    """The probability that the commonest answer of k samples is right, drawn without replacement from `correct` right
    ones, `others` of each other answer, and `silent` without answer, which do not vote. A tie is drawn for."""
    total = 0.0
    for votes in range(1, min(correct, k) + 1):
        ways = _ways_of_others(others, silent, votes, k - votes)
        total += math.comb(correct, votes) * sum(count / (1 + ties) for ties, count in enumerate(ways))
    return total / math.comb(correct + sum(others) + silent, k)


def _ways_of_others(others: Sequence[int], silent: int, most: int, draws: int) -> list[int]:
    """[ties]: how many ways there are to draw `draws` samples from the others and the silent such that no answer has
    more than `most` votes and exactly `ties` answers have that many."""
    ways = [[0] * (len(others) + 1) for _ in range(draws + 1)]
    for drawn in range(min(silent, draws) + 1):
        ways[drawn][0] = math.comb(silent, drawn)
    for size in others:
        grown = [[0] * (len(others) + 1) for _ in range(draws + 1)]
        for drawn, of_ties in enumerate(ways):
            for votes in range(min(size, most, draws - drawn) + 1):
                tie = int(votes == most)
                for ties, count in enumerate(of_ties[: len(others) + 1 - tie]):
                    grown[drawn + votes][ties + tie] += count * math.comb(size, votes)
        ways = grown
    return ways[draws]


def powers_of_two(up_to: int) -> list[int]:
    """1, 2, 4 ... and `up_to` itself."""
    return sorted({up_to, *(1 << bit for bit in range(up_to.bit_length()))} - {0})


def t_tail(value: float, freedom: int) -> float:
    """P(T > value), value >= 0, of Student's distribution with `freedom` degrees."""
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + value**2), regularized=True)) / 2


@lru_cache
def t_quantile(freedom: int) -> float:
    """The value that Student's distribution with `freedom` degrees exceeds with probability 2.5%."""
    start = statistics.NormalDist().inv_cdf(1 - _TAIL)
    return float(findroot(lambda value: t_tail(float(value), freedom) - _TAIL, (start, 13.0), solver="anderson"))


def _sign_flip_p_value(differences: np.ndarray, seed: int) -> float:
    count = len(differences)
    observed = abs(differences.sum()) - _ROUNDING
    if count <= _EXACT_SIGNS_UP_TO:
        signs = np.array(list(product((-1, 1), repeat=count)), dtype=np.int8)
        return float((np.abs(signs @ differences) >= observed).mean())
    draw = np.random.default_rng(derive(seed, "sign flips"))
    signs = draw.integers(2, size=(_SIGN_DRAWS, count), dtype=np.int8) * 2 - 1
    return (1 + int((np.abs(signs @ differences) >= observed).sum())) / (1 + _SIGN_DRAWS)


def _logistic(odds: float) -> float:
    return 1 / (1 + math.exp(-odds)) if odds > 0 else math.exp(odds) / (1 + math.exp(odds))
