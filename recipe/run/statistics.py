"""Estimates from repeated samples of the same problems.

Samples of one problem are not independent, so every interval is over problems: a value is computed for each problem,
and the problems are taken for a sample of those that might have been asked ("clustered by problem"; Miller, "Adding
Error Bars to Evals", arXiv:2411.00640). P is their number.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from scipy import special

from recipe.system.seeds import derive

_TAIL = 0.025
_POWER = 0.8
_BOOTSTRAP_DRAWS = 10_000
_SIGN_DRAWS = 100_000
_SIGNS_AT_ONCE = 1_000
_EXACT_SIGNS_UP_TO = 16
_ROUNDING = 1e-9
_UNSEEN_AGAINST, _UNSEEN_FOR = 0.65, 0.35
"""How the one problem that nobody asked is shared between the end of the scale that widens a bound and the other."""


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
    """The p-value by flipping the signs of the differences, which assumes no distribution: all 2^P flips for few
    problems, random ones for many."""


def clustered_mean(values: Sequence[float]) -> Estimate:
    """The mean of [P] values of problems, with Student's interval; unbounded from one problem alone."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half_width = t_quantile(len(values) - 1) * standard_error(values)
    return Estimate(mean, mean - half_width, mean + half_width)


def clustered_share(values: Sequence[float]) -> Estimate:
    """As `clustered_mean` of [P] shares between 0 and 1, with an interval that allows for problems unlike those seen:
    where nearly all problems are solved always, or never, their spread says little of those that are not.

    The interval is of the Bayesian bootstrap (Rubin, Annals of Statistics 9(1), 1981) of the P values and one problem
    more, of which `_UNSEEN_AGAINST` is 0 and the rest 1 for the lower bound, and the other way round for the upper one;
    its closed form is the beta distribution of the same mean and variance. Of problems that are solved always or never,
    s of them always, it is Beta(s + w, P - s + 1 - w): w = 1/2 at both bounds gives Jeffreys's interval, 0 and 1 that
    of Clopper and Pearson (Brown, Cai and DasGupta, Statistical Science 16(2), 2001) and, for any values, Gaffke's
    (Learned-Miller and Thomas, arXiv:1905.06208). Jeffreys's covers too rarely near 0 and 1, the others too often
    elsewhere; the shares between were chosen by simulation.
    """
    mean = statistics.fmean(values)
    low = float(special.betaincinv(*_with_unseen(values, _UNSEEN_FOR), _TAIL))
    high = float(special.betaincinv(*_with_unseen(values, _UNSEEN_AGAINST), 1 - _TAIL))
    return Estimate(mean, min(low, mean), max(high, mean))


def _with_unseen(values: Sequence[float], solved: float) -> tuple[float, float]:
    """The beta distribution, as its two parameters, of the mean and variance that the Bayesian bootstrap has of [P]
    values and one problem more, `solved` of which is 1."""
    total = len(values) + 1
    mean = (math.fsum(values) + solved) / total
    variance = ((math.fsum(value**2 for value in values) + solved) / total - mean**2) / (total + 1)
    size = mean * (1 - mean) / variance - 1
    return mean * size, (1 - mean) * size


def bootstrap_share(values: Sequence[float], seed: int) -> Estimate:
    """As `clustered_share`, with the interval of drawn weights: a check of the closed form."""
    draw = np.random.default_rng(derive(seed, "bootstrap"))
    weights = draw.standard_exponential((_BOOTSTRAP_DRAWS, len(values)))
    against, in_favour = (draw.standard_gamma(share, _BOOTSTRAP_DRAWS) for share in (_UNSEEN_AGAINST, _UNSEEN_FOR))
    sums, totals = weights @ np.asarray(values, dtype=np.float64), weights.sum(axis=1) + against + in_favour
    low = float(np.quantile((sums + in_favour) / totals, _TAIL))
    high = float(np.quantile((sums + against) / totals, 1 - _TAIL))
    mean = statistics.fmean(values)
    return Estimate(mean, min(low, mean), max(high, mean))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of [P] values of problems, P at least 2."""
    return statistics.stdev(values) / math.sqrt(len(values))


def paired_estimate(left: Sequence[float], right: Sequence[float], samples: tuple[int, int]) -> Estimate:
    """The estimate of `paired_difference`."""
    return _paired(left, right, samples)[0]


def mean_difference(left: Sequence[float], right: Sequence[float], seed: int) -> Difference:
    """As `paired_difference`, of [P] values that may be any numbers."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    estimate = clustered_mean(differences)
    if len(differences) < 2:
        return Difference(estimate, 1.0, 1.0)
    error = standard_error(differences)
    if error:
        p_value = 2 * float(special.stdtr(len(differences) - 1, -abs(estimate.mean) / error))
    else:
        p_value = float(estimate.mean == 0)
    return Difference(estimate, p_value, _sign_flip_p_value(np.asarray(differences), seed))


def paired_difference(left: Sequence[float], right: Sequence[float], samples: tuple[int, int], seed: int) -> Difference:
    """Left less right: [P] shares each, in the same order of problems, of so many `samples` of a problem.

    The spread of the differences may be nothing, where all happen to be alike, so the error is at least half of what
    the draw of samples alone makes it (Miller, section 3: variance within problems), with shares shrunk as by
    Jeffreys's prior: chance hardly ever makes it less. One problem alone says nothing of others.
    """
    estimate, error = _paired(left, right, samples)
    if not error:
        return Difference(estimate, 1.0, 1.0)
    differences = np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    p_value = 2 * float(special.stdtr(len(differences) - 1, -abs(estimate.mean) / error))
    return Difference(estimate, p_value, _sign_flip_p_value(differences, seed))


def _paired(left: Sequence[float], right: Sequence[float], samples: tuple[int, int]) -> tuple[Estimate, float]:
    """The estimate and its standard error; 0 for one problem alone."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Estimate(mean, -1.0, 1.0), 0.0
    drawn = sum(_variance_of_share(share, samples[0]) for share in left)
    drawn += sum(_variance_of_share(share, samples[1]) for share in right)
    error = max(standard_error(differences), math.sqrt(drawn) / count / 2)
    half_width = t_quantile(count - 1) * error
    return Estimate(mean, max(-1.0, mean - half_width), min(1.0, mean + half_width)), error


def smallest_gain(problems: int, samples: int) -> float:
    """The smallest true difference of two scores of the same problems, of so many `samples` of each, that the paired t
    test at 5% finds four times of five (80% power): (t quantile of 97.5% + t quantile of 80%) x standard error, the
    usual approximation (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, section 5).

    Only the draw of samples is counted, at its largest: every problem is solved half of the time, so a sample's
    variance is 1/4, and every problem gains alike. Problems that are solved always or never make it smaller, problems
    that gain differently make it larger. Infinite for one problem."""
    if problems < 2:
        return math.inf
    quantiles = sum(float(special.stdtrit(problems - 1, share)) for share in (1 - _TAIL, _POWER))
    return quantiles * math.sqrt(2 * 0.25 / (problems * samples))


def _variance_of_share(share: float, samples: int) -> float:
    shrunk = (share * samples + 0.5) / (samples + 1)
    return shrunk * (1 - shrunk) / samples


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k samples is right, drawn from `samples` of which `correct` are: the unbiased
    estimator of Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, equation 1."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(correct: int, others: Sequence[int], silent: int, k: int) -> float:
    """The probability that the commonest answer of k samples is right, drawn without replacement from `correct` right
    ones, `others` of each other answer, and `silent` without answer, which do not vote. A tie is drawn for."""
    total = Fraction(0)
    for votes in range(1, min(correct, k) + 1):
        ways = _ways_of_others(others, silent, votes, k - votes)
        total += math.comb(correct, votes) * sum(Fraction(count, 1 + ties) for ties, count in enumerate(ways))
    return float(total / math.comb(correct + sum(others) + silent, k))


def _ways_of_others(others: Sequence[int], silent: int, most: int, draws: int) -> list[int]:
    """[ties]: how many ways there are to draw `draws` samples from the others and the silent such that no answer has
    more than `most` votes and exactly `ties` answers have that many."""
    rivals = [size for size in others if size >= most]
    harmless = silent + sum(others) - sum(rivals)
    ways = [[0] * (len(rivals) + 1) for _ in range(draws + 1)]
    for drawn in range(draws + 1):
        ways[drawn][0] = math.comb(harmless, drawn)
    for size in rivals:
        grown = [[0] * (len(rivals) + 1) for _ in range(draws + 1)]
        for drawn, of_ties in enumerate(ways):
            for votes in range(min(size, most, draws - drawn) + 1):
                tie = int(votes == most)
                for ties, count in enumerate(of_ties[: len(rivals) + 1 - tie]):
                    grown[drawn + votes][ties + tie] += count * math.comb(size, votes)
        ways = grown
    return ways[draws]


def powers_of_two(up_to: int) -> list[int]:
    """1, 2, 4 ... and `up_to` itself."""
    return sorted({up_to, *(1 << bit for bit in range(up_to.bit_length()))} - {0})


def t_quantile(freedom: int) -> float:
    """The value that Student's distribution with `freedom` degrees exceeds with probability 2.5%."""
    return float(special.stdtrit(freedom, 1 - _TAIL))


def _sign_flip_p_value(differences: np.ndarray, seed: int) -> float:
    count = len(differences)
    observed = abs(differences.sum()) - _ROUNDING
    if count <= _EXACT_SIGNS_UP_TO:
        signs = np.array(list(product((-1, 1), repeat=count)), dtype=np.int8)
        return float((np.abs(signs @ differences) >= observed).mean())
    draw = np.random.default_rng(derive(seed, "sign flips"))
    beyond = 0
    for _ in range(0, _SIGN_DRAWS, _SIGNS_AT_ONCE):
        signs = draw.integers(2, size=(_SIGNS_AT_ONCE, count), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + beyond) / (1 + _SIGN_DRAWS)
