"""Estimates from repeated samples of the same problems."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def clustered_mean(scores: Sequence[Sequence[float]]) -> Estimate:
    """The mean over problems of each problem's mean score, with the normal interval whose standard error is clustered
    by problem: samples of one problem are not independent (Miller, "Adding Error Bars to Evals", arXiv:2411.00640).

    `scores` has the scores of the samples of each problem. From one problem alone the interval is unbounded.
    """
    means = [statistics.fmean(of_problem) for of_problem in scores]
    mean = statistics.fmean(means)
    if len(means) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half_width = Z_95 * statistics.stdev(means) / math.sqrt(len(means))
    return Estimate(mean, mean - half_width, mean + half_width)
