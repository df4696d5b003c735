"""What sympy is asked, which may take any time and memory on a hostile answer: import this only in a process of
`recipe.rewards.workers`."""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import sympy
from sympy.core.evalf import PrecisionExhausted

from recipe.rewards.comparing import TreeRules, equal
from recipe.rewards.exact import TooLarge, rational
from recipe.rewards.expressions import Tree, has_symbols
from recipe.rewards.values import Number, Reading

_PRECISION = 400
"""Digits to which two numbers that are not proven equal are told apart at most."""
_MARGIN = sympy.Rational(1, 10 ** (_PRECISION // 4))
_PROBES = (sympy.Rational(17, 13), sympy.Rational(29, 11), sympy.Rational(41, 37), sympy.Rational(7, 19))


def compare(answer: Reading, label: Reading) -> tuple[bool, str]:
    """Whether answer and label are equal, and the exact value of an answer that is one number, as sympy writes it, or
    an empty text.

    Only what is proven counts as equal."""
    try:
        return equal(answer, label, TreeRules(same, proportional)), _written(answer)
    except TooLarge:
        return False, ""


def _written(answer: Reading) -> str:
    match answer.values:
        case (Number(tree), *others) if all(isinstance(other, Number) and same(tree, other.tree) for other in others):
            with suppress(ValueError):  # an integer of more digits than Python writes
                return str(as_sympy(tree))
    return ""


def same(left: Tree, right: Tree) -> bool:
    """Whether two expressions are proven equal."""
    if left == right:
        return True
    try:
        a, b = rational(left), rational(right)
        if a is not None and b is not None:
            return a == b
        if has_symbols(left) != has_symbols(right) and (a is not None or b is not None):
            return _is_zero(as_sympy(left) - as_sympy(right))
        one, other = as_sympy(left), as_sympy(right)
    except TooLarge:
        return False
    if one.has(sympy.nan, sympy.zoo) or other.has(sympy.nan, sympy.zoo):
        return False
    if one.has(sympy.oo, -sympy.oo) or other.has(sympy.oo, -sympy.oo):
        return bool(one == other)
    return _is_zero(one - other)


def proportional(left: Tree, right: Tree, positive: bool) -> bool:
    """Whether two expressions are proven to differ by a constant factor that is not zero."""
    one, other = as_sympy(left), as_sympy(right)
    if _is_zero(one) or _is_zero(other):
        return False
    ratio = sympy.simplify(one / other)
    if ratio.free_symbols or ratio.has(sympy.nan, sympy.zoo, sympy.oo) or ratio == 0:
        return False
    return bool(ratio.is_positive) if positive else True


def _is_zero(difference: sympy.Expr) -> bool:
    """Whether an expression is proven to be zero."""
    if difference.is_Rational:
        return bool(difference == 0)
    if _is_far_from_zero(difference):
        return False
    for attempt in (sympy.expand, sympy.simplify, sympy.radsimp):
        if attempt(difference) == 0:
            return True
    return not difference.free_symbols and difference.equals(0) is True


def _is_far_from_zero(difference: sympy.Expr) -> bool:
    """Whether an expression, or its value at one place, is not zero to many digits."""
    symbols = sorted(difference.free_symbols, key=str)
    probe = difference.subs({symbol: _PROBES[place % len(_PROBES)] + place for place, symbol in enumerate(symbols)})
    if probe.has(sympy.nan, sympy.zoo):
        return False
    try:
        value = sympy.N(probe, 15, maxn=_PRECISION, strict=True)
    except PrecisionExhausted:
        return False
    return bool(value.is_number and value.is_finite and value != 0)


@lru_cache(1024)
def as_sympy(tree: Tree) -> sympy.Expr:
    """The expression of a tree. Raises TooLarge."""
    value = rational(tree)
    if value is not None:
        return sympy.Rational(value.numerator, value.denominator)
    match tree:
        case ("symbol", name):
            return sympy.Symbol(name)
        case ("constant", name):
            return _CONSTANTS[name]
        case ("open", inside):
            return as_sympy(inside)
        case ("-", inside):
            return -as_sympy(inside)
        case ("+", *parts):
            return sympy.Add(*map(as_sympy, parts))
        case ("*", *parts):
            return sympy.Mul(*map(as_sympy, parts))
        case ("/", above, below):
            return as_sympy(above) / as_sympy(below)
        case ("^", base, exponent):
            raised = as_sympy(base), as_sympy(exponent)
            return sympy.nan if raised == (0, 0) else raised[0] ** raised[1]
        case ("call", name, *arguments):
            return _CALLS[name](*map(as_sympy, arguments))
    return sympy.nan


def _root(inside: sympy.Expr, order: sympy.Expr) -> sympy.Expr:
    is_odd = order.is_Integer and order % 2 == 1
    return sympy.real_root(inside, order) if is_odd and inside.is_number else inside ** (1 / order)


def _floor(inside: sympy.Expr) -> sympy.Expr:
    """The integer below a number whose decimals tell it; else a function that says nothing."""
    if inside.is_number and inside.is_real:
        try:
            value = sympy.N(inside, _PRECISION, maxn=2 * _PRECISION, strict=True)
        except PrecisionExhausted:
            return sympy.Function("floor")(inside)
        below = int(sympy.floor(value))
        if abs(value) < 10 ** (_PRECISION // 2) and _MARGIN < value - below < 1 - _MARGIN:
            return sympy.Integer(below)
    return sympy.Function("floor")(inside)


def _ceiling(inside: sympy.Expr) -> sympy.Expr:
    return -_floor(-inside)


def _logarithm(inside: sympy.Expr, base: sympy.Expr | None = None) -> sympy.Expr:
    return sympy.log(inside, 10 if base is None else base)


_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}
_CALLS: dict[str, Callable[..., sympy.Expr]] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "arcsec": sympy.asec,
    "arccsc": sympy.acsc, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "arcsinh": sympy.asinh,
    "arccosh": sympy.acosh, "arctanh": sympy.atanh, "exp": sympy.exp, "ln": sympy.log, "log": _logarithm,
    "lg": _logarithm, "root": _root, "abs": sympy.Abs, "floor": _floor, "ceil": _ceiling,
    "binom": sympy.binomial, "factorial": sympy.factorial, "max": sympy.Max, "min": sympy.Min,
    "degree": lambda inside: inside * sympy.pi / 180, "gcd": sympy.Function("gcd"), "lcm": sympy.Function("lcm"),
}  # fmt: skip
