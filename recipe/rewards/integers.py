r"""Whether an answer is a given integer, told without algebra where that can be told.

math-verify alone is too generous where the label is an integer: it adds `12 13` up to 25, and drops the base of
`25_{16}`, the sign of `\ge 25` and the second answer of `25\text{ or 30}`. So only what is one arithmetic expression is
left to it, and whatever else stands beside a number must be known to mean nothing.
"""

import re
import unicodedata

from recipe.rewards.extract import braced

MAX_ANSWER_CHARACTERS = 1000
"""A longer answer is wrong unless it is the label itself."""

_MAX_EXPRESSION_CHARACTERS = 200
"""Longer arithmetic is no final answer, and takes math-verify's parser more time than it is worth."""
_MAX_BASE = 36
_LOOKS = re.compile(
    r"\\(?:displaystyle|textstyle|[Ll]arge|LARGE|[Hh]uge|bf|rm|left|right|[Bb]igg?[lr]?)(?![a-zA-Z])"
    r"|\\color\s*\{\s*\w+\s*\}|\\(?=\$)"
)
_BLANKS = re.compile(r"(?:\\[ ,;:!]|\\q?quad(?![a-zA-Z])|~|\s)+")
_THOUSANDS_BY_BLANKS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,])", re.ASCII)
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))", re.ASCII)
_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?", re.ASCII)
_IN_BASE = re.compile(r"(\d+)_(?:(\d)|\{(\d{1,2})\})", re.ASCII)
_FONT = re.compile(
    r"\\(?:textcolor\s*\{\s*\w+\s*\}|(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox|[bf]box|boxed|emph"
    r"|underline)(?![a-zA-Z]))\s*"
)
_DELIMITERS = (("\\(", "\\)"), ("\\[", "\\]"), ("\\{", "\\}"), ("(", ")"), ("[", "]"))
_DEGREES_OR_PERCENT = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\?%)$")
_BEFORE_UNIT = re.compile(r"[\d)}](?=\s*\\(?:text|mathrm|textrm|mbox)\s*\{|\s?[a-zA-Z])")
_UNIT = re.compile(
    r"\s*(?:\\(?:text|mathrm|textrm|mbox)\s*\{([^{}\d]*)\}|( [a-zA-Z]{3}[a-zA-Z /.]*|\s?(?:[ckm]m|kg|ft|th|st|nd|rd)))"
    r"(?:\s*\^\s*(?:[23]|\{[23]\}))?"
)
_CHANGES_THE_VALUE = re.compile(
    r"\b(?:or|and|not|nor|if|mod|modulo|base|than|less|more|most|least|about|over|minus|plus|point|half|hundred"
    r"|thousand|million|billion|trillion|dozen|factorial|squared|cubed)\b",
    re.IGNORECASE,
)
_SECOND_STATEMENT = re.compile(
    r"[,;<>≠≤≥≈¬!]|\\(?:not|neg?|neq|[gl]eq?|[gl]t|approx|sim|equiv|to|implies|iff|[RrLl]\w*arrow|or|lor|vee|cup|pm)"
    r"(?![a-zA-Z])"
)
_ARITHMETIC = re.compile(
    r"(?:\\(?:[dtc]?frac|sqrt|cdot|times|div|binom|choose|pi|log|ln|[lr]floor|[lr]ceil|[lr]vert)(?![a-zA-Z])"
    r"|[\d.+\-*/^(){}\[\]!|_ \u00d7\u00f7])+",
    re.ASCII,
)
_SIDE_BY_SIDE = re.compile(r"(?<![\d.^_])(?<!frac )(?<!binom )\d[\d.]* +\d", re.ASCII)


def canonical_integer(text: str) -> str | None:
    r"""The integer that a text plainly is, without leading zeros, or None.

    Understands signs, thousands separators (`1,000`, `1{,}000`, `1\,000`, `1 000`), full-width digits, a fraction of
    zeros, a closing full stop and surrounding dollars or blanks. The number may be of any size: it is never converted.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    return _integer(_plain(text).strip("$ "))


def equals_integer(answer: str, integer: str) -> bool | None:
    """Whether an answer is the integer, in its canonical form; None where the answer is an arithmetic expression whose
    value must be computed. What is neither is another answer."""
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    bare = _without_ornaments(_plain(answer))
    number = _integer(bare)
    if number is not None:
        return number == integer
    if in_base := _IN_BASE.fullmatch(bare):
        return _decimal(in_base[1], int(in_base[2] or in_base[3])) == integer
    expression = _THOUSANDS_COMMA.sub("", bare)
    if len(expression) > _MAX_EXPRESSION_CHARACTERS:
        return False
    if _ARITHMETIC.fullmatch(expression) and not _SIDE_BY_SIDE.search(expression):
        return None
    return False


def _integer(plain: str) -> str | None:
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _decimal(digits: str, base: int) -> str | None:
    """The decimal form of a number written in a base; None if it is no number of that base."""
    if not 2 <= base <= _MAX_BASE or any(int(digit) >= base for digit in digits):
        return None
    return str(int(digits, base))


def _plain(text: str) -> str:
    """The text with ASCII digits for full-width and bold ones (but not for raised or circled ones, which mean something
    else), one blank for TeX's many, commas between thousands, and without commands that change the looks alone."""
    if not text.isascii():
        text = "".join(unicodedata.normalize("NFKC", c) if _is_variant(c) else c for c in text)
        text = text.replace("\N{MINUS SIGN}", "-")
    text = text.replace("{,}", ",").replace(",\\!", ",")
    text = _BLANKS.sub(" ", _LOOKS.sub("", text)).strip()
    return _THOUSANDS_BY_BLANKS.sub(lambda match: match[0].replace(" ", ","), text)


def _is_variant(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<wide>", "<font>", "<noBreak>"))


def _without_ornaments(text: str) -> str:
    """The text without what may surround a number and leave it the number it is: punctuation, delimiters, fonts, the
    left side of an equation, a unit."""
    text = text[:-1] if text.endswith((".", ",", ";")) else text
    while True:
        inner = _without_unit(_right_side(_unwrapped(text.strip("$ ")))).strip()
        if inner == text:
            return text
        text = inner


def _unwrapped(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        if text == opening + inside + closing and opening not in inside and closing not in inside:
            return inside
    font = _FONT.match(text)
    start = font.end() if font else 0
    if text.startswith("{", start) and text.endswith("}"):
        inside = text[start + 1 : -1]
        return inside if braced(text, start) == inside else text
    return text


def _right_side(text: str) -> str:
    """What follows the last equals sign, if what precedes it is no answer of its own: anything that makes one statement
    and, in a chain, arithmetic."""
    *sides, right = text.split("=")
    if not sides:
        return text
    first, middle = sides[0], sides[1:]
    digits_and_words = "\\text" in first and any(character.isdigit() for character in first)
    if digits_and_words or _SECOND_STATEMENT.search(first) or _CHANGES_THE_VALUE.search(first):
        return text
    return right if all(_ARITHMETIC.fullmatch(side) for side in middle) else text


def _without_unit(text: str) -> str:
    if symbol := _DEGREES_OR_PERCENT.search(text):
        return text[: symbol.start()]
    last = _BEFORE_UNIT.search(text)
    unit = _UNIT.fullmatch(text, last.end()) if last else None
    if last is None or unit is None or _CHANGES_THE_VALUE.search(unit[1] or unit[2] or ""):
        return text
    return text[: last.end()]
