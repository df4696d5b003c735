"""How long responses are: a distribution with a mean, a spread and a cap, or what a run's own samples were."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy.special import ndtr, ndtri

from recipe.system.errors import UserError
from recipe.system.seeds import derive

NEWEST_ROLLOUTS = 5
"""Of a run, whose lengths are taken: they change while it learns."""
SHARES = 4096
"""Places at which a distribution is written down."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of responses: `quantiles` [Q], rising, at shares (i + 1/2) / Q."""

    quantiles: np.ndarray

    @classmethod
    def log_normal(cls, mean: float, spread: float, cap: int) -> Self:
        """A log-normal distribution cut off at `cap` whose mean is `mean` then; `spread` is the standard deviation over
        the mean before the cut. Raises UserError if no such distribution has that mean."""
        if not 0 < mean <= cap or spread < 0:
            raise UserError(
                f"responses cannot have a mean of {mean:g} tokens and a spread of {spread:g}: the mean lies between 0 "
                f"and the longest response, {cap}, and the spread is not negative"
            )
        from scipy.optimize import brentq  # for half a second, which every process of a run would wait

        sigma = math.sqrt(math.log1p(spread**2))
        shares = (np.arange(SHARES) + 0.5) / SHARES
        if sigma == 0 or mean > 0.999 * cap:
            return cls(np.full(SHARES, mean))

        def too_long(center: float) -> float:
            return _mean_of_cut(center, sigma, cap) - mean

        center = brentq(too_long, math.log(mean) - 1 - sigma**2, math.log(cap) + 8 * sigma + 8)
        return cls(np.minimum(np.exp(center + sigma * ndtri(shares)), cap))

    @classmethod
    def of_run(cls, directory: Path) -> Self:
        """Those of a run's newest rollouts. Raises UserError if it has none."""
        files = sorted((directory / "rollouts").glob("*.jsonl"))[-NEWEST_ROLLOUTS:]
        try:
            found = [json.loads(line)["response_length"] for file in files for line in file.read_text().splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the rollouts in {directory} cannot be read ({error})") from error
        if not found:
            raise UserError(f"{directory} holds no rollouts: name the directory of a run that has made some")
        return cls(np.sort(np.asarray(found, dtype=float)))

    @property
    def mean(self) -> float:
        return float(self.quantiles.mean())

    def capped(self, cap: int) -> "Lengths":
        """The same responses where none may be longer."""
        return Lengths(np.minimum(self.quantiles, cap))

    def draw(self, count: int, seed: int) -> np.ndarray:
        """[count] whole tokens, at least 1: evenly spaced in the distribution, in an order that `seed` decides."""
        places = (np.arange(count) + 0.5) / count * len(self.quantiles)
        spaced = np.maximum(1, np.rint(self.quantiles[places.astype(int)])).astype(np.int64)
        return np.random.default_rng(derive(seed, "planned lengths")).permutation(spaced)


def _mean_of_cut(center: float, sigma: float, cap: int) -> float:
    """Mean of min(X, cap) of X = exp(center + sigma Z): the partial expectation of a log-normal distribution."""
    border = (math.log(cap) - center) / sigma
    return float(math.exp(center + sigma**2 / 2) * ndtr(border - sigma) + cap * ndtr(-border))


def parse_lengths(mean: float | None, spread: float, run: Path | None, cap: int, share: float) -> Lengths:
    """From the command line: a run's lengths, or a mean, or that `share` of the longest response."""
    if run is not None:
        return Lengths.of_run(run).capped(cap)
    return Lengths.log_normal(share * cap if mean is None else mean, spread, cap)
