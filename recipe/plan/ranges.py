"""Numbers that are not known exactly: what they are at best and at worst."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Self


class Pace(Enum):
    """Which end of every range a plan of time takes."""

    BEST = "best"
    WORST = "worst"


@dataclass(frozen=True)
class Between:
    """A rate, a time or an amount of money. At best a rate is high, and a time is short."""

    best: float
    worst: float

    @classmethod
    def exactly(cls, value: float) -> Self:
        """A number that was measured here."""
        return cls(value, value)

    def at(self, pace: Pace) -> float:
        return self.best if pace is Pace.BEST else self.worst

    def __add__(self, other: "Between") -> "Between":
        return Between(self.best + other.best, self.worst + other.worst)

    def __mul__(self, factor: float) -> "Between":
        return Between(self.best * factor, self.worst * factor)

    def larger(self, other: "Between") -> "Between":
        """At each end the larger of both."""
        return Between(max(self.best, other.best), max(self.worst, other.worst))

    @property
    def middle(self) -> float:
        """The geometric mean, by which alternatives are compared."""
        return math.sqrt(self.best * self.worst)


def two_digits(value: float) -> str:
    """Rounded to two significant digits: 0.043, 1.3, 24, 3,900."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 else f"{rounded:.2g}"


def range_text(found: Between) -> str:
    """Two digits of both ends; one number where they are the same."""
    ends = [two_digits(end) for end in sorted((found.best, found.worst))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
