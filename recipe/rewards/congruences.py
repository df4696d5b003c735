r"""Congruences and remainders: `n \equiv 4 \pmod{13}`, `2^{55} \bmod 1000 = 968`, `204 \text{ (mod 1000)}`."""

import re

from recipe.rewards.exact import TooLarge, rational
from recipe.rewards.expressions import Unreadable, has_symbols, number, read_expression
from recipe.rewards.names import is_name, is_opaque
from recipe.rewards.ornaments import peeled
from recipe.rewards.plain import TEXT, canonical_integer
from recipe.rewards.splitting import split
from recipe.rewards.values import MODULAR, Group, Number

_MOD_IN_TEXT = re.compile(rf"{TEXT}\s*\{{([^{{}}]*(?<![a-zA-Z])mod(?:ulo)?(?![a-zA-Z])[^{{}}]*)\}}")
_MODULUS = re.compile(
    r"\s*\(?\s*(?:\\[bp]?mod(?![a-zA-Z])|(?<![a-zA-Z\\])mod(?:ulo)?(?![a-zA-Z]))\s*\{?\s*([\d,]+)\s*\}?\s*\)?$",
    re.ASCII,
)
_IS_CONGRUENCE = re.compile(r"\\[bp]?mod(?![a-zA-Z])|(?<![a-zA-Z\\])mod(?:ulo)?(?![a-zA-Z])|\\equiv(?![a-zA-Z])")
_SIGN = re.compile(r"=|\\equiv(?![a-zA-Z])")


def is_congruence(text: str) -> bool:
    return _IS_CONGRUENCE.search(_MOD_IN_TEXT.sub(r"\1", text)) is not None


def read(text: str) -> tuple[tuple[Number | Group, ...], str]:
    """The residue with its modulus, or the remainder of an equation, and the name of what they are.

    Raises Unreadable."""
    parts, signs = split(_MOD_IN_TEXT.sub(r"\1", text), _SIGN)
    sides = [(_MODULUS.sub("", part.strip()), _MODULUS.search(part.strip())) for part in parts]
    moduli = {int(match[1].replace(",", "")) for _, match in sides if match}
    if len(moduli) != 1 or 0 in moduli:
        raise Unreadable("is a congruence without one modulus")
    (modulus,) = moduli
    residues: list[int] = []
    name = ""
    for side, _ in sides:
        residue = _residue(side, modulus)
        if residue is not None:
            residues.append(residue)
        else:
            name = name or "".join(side.split())
    if len({residue % modulus for residue in residues}) != 1:
        raise Unreadable("is a congruence of several residues, or of none")
    last = next(side for side, _ in reversed(sides) if _residue(side, modulus) is not None)
    written = canonical_integer(peeled(last).text)
    if written is None:
        raise Unreadable("has a residue that is not worked out")
    is_remainder = sides[-1][1] is None and "\\equiv" not in signs
    if is_remainder:
        if not 0 <= int(written) < modulus:
            raise Unreadable("has a remainder that is none")
        return (Number(number(int(written))),), name
    return (Group(MODULAR, (Number(number(int(written))), Number(number(modulus)))),), name


def _residue(side: str, modulus: int) -> int | None:
    """The integer that a side comes to, or None if it only names one or is too large. Raises Unreadable."""
    text = peeled(side).text
    try:
        tree = read_expression(text.replace(",", "") if canonical_integer(text) else text)
    except Unreadable:
        if is_name(text) or is_opaque(text):
            return None
        raise
    if has_symbols(tree):
        if is_name(text) or is_opaque(text):
            return None
        raise Unreadable("is a congruence of an expression")
    try:
        value = rational(tree)
    except TooLarge:
        return None
    if value is None or value.denominator != 1:
        raise Unreadable("is a congruence of what is no integer")
    return int(value)
