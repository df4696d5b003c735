"""What math-verify and sympy are asked, which may take any time and memory on a hostile answer: import this only in a
process of `recipe.rewards.workers`."""

import sympy
from math_verify import parse, verify

_MAX_BITS = 4000
"""Of a number that is written out."""


def compute(question: str, *texts: str) -> bool | str:
    """`algebraically_equal` ("equal") or `value_of` ("value") of the texts."""
    return algebraically_equal(*texts) if question == "equal" else value_of(*texts)


def algebraically_equal(answer: str, label: str) -> bool:
    """Whether math-verify holds the two for equal. An answer that it cannot read is wrong.

    Raises ValueError for a label that it cannot read, and whatever math-verify raises in comparing.
    """
    gold = parse(f"\\boxed{{{label}}}", parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify cannot read the label {label!r}")
    predicted = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(gold, predicted, timeout_seconds=None, raise_on_error=True))


def value_of(expression: str) -> str:
    """The exact value of an expression of `recipe.rewards.tex_arithmetic`: an integer in its canonical form, another
    number as sympy writes it, or the expression itself if math-verify cannot read it."""
    read = next((item for item in parse(f"\\boxed{{{expression}}}", parsing_timeout=None) if _is_number(item)), None)
    if read is None:
        return expression
    value = read.doit()
    if not value.is_Rational:
        value = _integer_near(sympy.simplify(value))
    if value.is_Integer and abs(int(value)).bit_length() > _MAX_BITS:
        return f"a number of {int(value).bit_length()} bits"
    return str(value)


def _integer_near(value: sympy.Expr) -> sympy.Expr:
    """The integer that the value is, where sympy can prove it, else the value."""
    if value.is_real and not value.is_Rational:
        nearest = sympy.Integer(round(value.evalf()))
        if value.equals(nearest):
            return nearest
    return value


def _is_number(item: object) -> bool:
    return isinstance(item, sympy.Expr) and not item.free_symbols
