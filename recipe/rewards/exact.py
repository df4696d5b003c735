"""Exact values of trees whose values are rational."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from recipe.rewards.expressions import Tree

MAX_BITS = 14_000
"""Size of the largest number that is computed: a larger one equals only what is written alike. Its decimal digits are
fewer than the 4,300 that Python writes out."""


class TooLarge(Exception):
    """A number has more bits than are computed."""


@lru_cache(4096)
def rational(tree: Tree) -> Fraction | None:
    """The value of a tree, or None if it has none, is not rational, or that takes algebra to tell. Raises TooLarge."""
    match tree:
        case ("number", above, below):
            return _bounded(Fraction(above, below))
        case ("-", inside):
            value = rational(inside)
            return None if value is None else -value
        case ("+", *parts):
            terms = _all(parts)
            return None if terms is None else _bounded(sum(terms, Fraction(0)))
        case ("*", *parts):
            factors = _all(parts)
            return None if factors is None else _bounded(math.prod(factors, start=Fraction(1)))
        case ("/", above, below):
            left, right = rational(above), rational(below)
            return None if left is None or not right else _bounded(left / right)
        case ("^", base, exponent):
            left, right = rational(base), rational(exponent)
            return None if left is None or right is None else _power(left, right)
        case ("open", inside):
            return rational(inside)
        case ("call", name, *arguments):
            values = _all(arguments)
            return None if values is None else _call(name, values)
    return None


def _all(trees: Sequence[Tree]) -> list[Fraction] | None:
    """The values of trees, or None if one of them has none."""
    values: list[Fraction] = []
    for tree in trees:
        value = rational(tree)
        if value is None:
            return None
        values.append(value)
    return values


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLarge
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _root(base, exponent.denominator) if base >= 0 else None
        return None if root is None else _power(root, Fraction(exponent.numerator))
    if base == 0:
        return Fraction(0) if exponent > 0 else None
    if (
        abs(base) != 1
        and abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > 2 * MAX_BITS
    ):
        raise TooLarge
    return _bounded(base ** int(exponent)) if abs(base) != 1 else base ** (int(exponent) % 2)


def _root(value: Fraction, order: int) -> Fraction | None:
    """The root of a number that is not negative, where it is rational."""
    above, below = _integer_root(value.numerator, order), _integer_root(value.denominator, order)
    return None if above is None or below is None else Fraction(above, below)


def _integer_root(value: int, order: int) -> int | None:
    if value < 2:
        return value
    if order > value.bit_length():
        return None
    low, high = 1, 1 << (value.bit_length() // order + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**order <= value else (low, middle - 1)
    return low if low**order == value else None


def _call(name: str, values: list[Fraction]) -> Fraction | None:
    value, *others = values
    match name:
        case "floor":
            return Fraction(math.floor(value))
        case "ceil":
            return Fraction(math.ceil(value))
        case "abs":
            return abs(value)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "root" if others[0].denominator == 1 and 2 <= others[0] <= MAX_BITS:
            order = int(others[0])
            if value < 0:
                root = _root(-value, order) if order % 2 else None
                return None if root is None else -root
            return _root(value, order)
        case "factorial" if value.denominator == 1 and value >= 0:
            if value > MAX_BITS // 8:
                raise TooLarge
            return _bounded(Fraction(math.factorial(int(value))))
        case "log" | "lg" | "ln":
            return _logarithm(value, others[0]) if others else _logarithm(value, Fraction(10)) if name != "ln" else None
    if all(item.denominator == 1 for item in values):
        return _of_integers(name, [int(item) for item in values])
    return None


def _of_integers(name: str, values: list[int]) -> Fraction | None:
    match name:
        case "gcd":
            return Fraction(math.gcd(*values))
        case "lcm":
            return _bounded(Fraction(math.lcm(*values)))
        case "binom" if len(values) == 2 and min(values) >= 0:
            above, below = values
            if min(below, above - below) * above.bit_length() > MAX_BITS:
                raise TooLarge
            return _bounded(Fraction(math.comb(above, below)))
    return None


def _logarithm(value: Fraction, base: Fraction) -> Fraction | None:
    """The logarithm where it is an integer."""
    if value <= 0 or base <= 0 or base == 1:
        return None
    if value == 1:
        return Fraction(0)
    exponent = round((_ln(value)) / _ln(base)) if _ln(base) else 0
    return Fraction(exponent) if abs(exponent) <= MAX_BITS and _power(base, Fraction(exponent)) == value else None


def _ln(value: Fraction) -> float:
    return math.log(value.numerator) - math.log(value.denominator)
