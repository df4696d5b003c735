r"""Which integer an answer is, told without algebra where that can be told.

math-verify alone is too generous where the label is an integer: it adds `12 13` up to 25, drops the base of `25_{16}`,
the sign of `\ge 25` and the second answer of `25\text{ or 30}`, and takes `N-1=25` for 25. So an answer is an integer
only if everything else in it is known to mean nothing: fonts, brackets, units of a closed list, "Answer:", and the name
of what was asked for on one side of an equation.
"""

import re
import unicodedata
from dataclasses import dataclass

from recipe.rewards.extract import braced
from recipe.rewards.names import is_name
from recipe.rewards.tex_arithmetic import explicit
from recipe.rewards.units import GLUED, LENGTHS, is_unit

MAX_ANSWER_CHARACTERS = 1000
"""A longer answer is wrong unless it is the label itself."""

_MAX_BASE = 36
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|math(?:bf|it|rm|sf|tt|normal)|mbox|hbox)"
_LOOKS = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|[Ll]arge|LARGE|[Hh]uge|small|normalsize|bf|rm|it|bfseries|itshape|boldmath"
    r"|left|right|[Bb]igg?[lr]?|strut|mathstrut|limits)(?![a-zA-Z])"
    r"|\\color\s*(?:\[\w+\])?\s*\{\s*\w+\s*\}|\\(?=\$)"
)
_EMPTY = re.compile(_TEXT + r"\s*\{[\s$~]*\}")
_BLANKS = re.compile(r"(?:\\[ ,;:!]|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)?space(?![a-zA-Z])|~|\s)+")
_THOUSANDS_BY_BLANKS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,])", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
_LIST = re.compile(r"(?:\(|\[|\\\{)[^()\[\]{}]*,")
_INTEGER = re.compile(r"([+-]?) ?([1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.0*)?", re.ASCII)
_IN_BASE = re.compile(r"(\d+)_ ?(?:(\d)|\{ ?(\d{1,2}) ?\})", re.ASCII)
_FONT = re.compile(
    rf"(?:\\(?:textcolor|colorbox)\s*(?:\[\w+\])?\s*\{{\s*\w+\s*\}}|{_TEXT}(?![a-zA-Z])"
    r"|\\(?:[bf]box|boxed|emph|underline|uline|boldsymbol|bm|pmb|[Bb]old|ensuremath)(?![a-zA-Z]))\s*"
)
_DELIMITERS = (("\\(", "\\)"), ("\\[", "\\]"), ("\\{", "\\}"), ("(", ")"), ("[", "]"), ("**", "**"))
_LEAD_WORDS = (
    r"\s*(?:the\s)?(?:final\s|correct\s|required\s|desired\s)?(?:(?:answer|ans\.?|result)(?:\s(?:is|equals))?"
    r"|(?:remainder|sum|product|value|total|number|area|perimeter|volume|length|distance)\s(?:is|equals))\s*[:=]?\s*"
)
_LEAD = re.compile(rf"(?:{_TEXT}\s*\{{{_LEAD_WORDS}\}}\s*[:=]?|{_LEAD_WORDS})\s*(?=[^\sa-z])", re.IGNORECASE)
_DEGREES_OR_PERCENT = re.compile(
    rf"\s*(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}})(?:\s*{_TEXT}\s*\{{\s*[CF]\s*\}})?|\\degrees?(?![a-zA-Z])|\\textdegree(?![a-zA-Z])|°|\\?%)$"
)
_ORDINAL = re.compile(rf"\s*\^\s*(?:\{{?\s*{_TEXT}\s*\{{\s*(?:st|nd|rd|th)\s*\}}\s*\}}?|\{{\s*(?:st|nd|rd|th)\s*\}})$")
_BEFORE_UNIT = re.compile(r"[\d)}](?=\s*(?:\\text|\\math|\\[mh]box)|\s?[a-zA-Z])")
_UNIT = re.compile(rf"(?:\s*{_TEXT}\s*\{{(?P<font>[^{{}}\d]*)\}}|(?P<bare>\s?[a-zA-Z][a-zA-Z /.]*))", re.ASCII)
_MODULO_1000 = re.compile(
    r" ?\(? ?(?:\\[bp]?mod(?![a-zA-Z])|\\(?:text|mathrm|operatorname) ?\{ ?mod ?\}|(?<![a-zA-Z\\{])mod)"
    r" ?\{? ?1,?000 ?\}? ?\)?$"
)
_REMAINDER = re.compile(r"\d{1,3}", re.ASCII)
_POWER = re.compile(r"\s*\^\s*(?:[23]|\{\s*[23]\s*\})$")
_WORD = re.compile(r"[^\s/.,()\-\N{MIDDLE DOT}]+")


@dataclass(frozen=True)
class Reading:
    """What an answer says. It is an integer if every one of its values is that."""

    bare: str
    """The answer without what means nothing."""
    integers: tuple[str, ...] = ()
    """Integers in their canonical form: one, or those of the sides of an equation."""
    expressions: tuple[str, ...] = ()
    """Arithmetic whose values must be computed."""

    @property
    def is_number(self) -> bool:
        return bool(self.integers or self.expressions)

    @property
    def value(self) -> str:
        """The integer, if it says just one, else the bare answer: what can be told without computing."""
        return self.integers[0] if len(set(self.integers)) == 1 else self.bare


def canonical_integer(text: str) -> str | None:
    r"""The integer that a text plainly is, without leading zeros, or None.

    Understands signs, thousands separators (`1,000`, `1{,}000`, `1\,000`, `1 000`), full-width digits, a fraction of
    zeros, a closing full stop and surrounding dollars or blanks. The number may be of any size: it is never converted.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    return _integer(_plain(text).strip("$ "))


def read_answer(answer: str) -> Reading:
    """What an answer of at most MAX_ANSWER_CHARACTERS says; without numbers if that is nothing but a text.

    Of an equation every side is a value but for names of what was asked for (`m+n`, `f(3)`), on either side; a side
    that is neither makes the whole a text. Modulo 1000 a number below 1000 is a value (AIME asks for that remainder).
    """
    bare = _without_ornaments(_plain(answer))
    integers: list[str] = []
    expressions: list[str] = []
    sides, is_remainder = _sides_by_1000(bare) if "mod" in bare else (_sides(bare), False)
    for side in map(_without_ornaments, sides):
        if is_remainder and not _REMAINDER.fullmatch(side):
            if len(sides) == 1 or not is_name(side):
                return Reading(bare)
        elif (number := _integer(side) or _in_base(side)) is not None:
            integers.append(number)
        elif (expression := explicit(_without_thousands(side))) is not None:
            expressions.append(expression)
        elif len(sides) == 1 or not is_name(side):
            return Reading(bare)
    return Reading(bare, tuple(integers), tuple(expressions))


def _sides_by_1000(text: str) -> tuple[list[str], bool]:
    """The sides of an equation or congruence without "modulo 1000", and whether that stood there."""
    congruence = text.replace("\\equiv", "=") if _MODULO_1000.search(text) else text
    sides = [_MODULO_1000.subn("", side.strip()) for side in _sides(congruence)]
    return [side for side, _ in sides], any(found for _, found in sides)


def _sides(text: str) -> list[str]:
    """What stands between the equals signs outside of braces."""
    sides, depth = [""], 0
    for character in text.replace(":=", "=").replace("==", "="):
        depth += (character == "{") - (character == "}")
        if character == "=" and depth == 0:
            sides.append("")
        else:
            sides[-1] += character
    return sides


def _without_thousands(side: str) -> str:
    """Without commas between thousands; those in brackets are a list's."""
    return side if _LIST.search(side) else _THOUSANDS.sub(lambda match: match[0].replace(",", ""), side)


def _integer(plain: str) -> str | None:
    match = _INTEGER.fullmatch(plain)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _in_base(text: str) -> str | None:
    """The decimal form of a number written in a base; None if it is no number of that base."""
    match = _IN_BASE.fullmatch(text)
    if match is None:
        return None
    digits, base = match[1], int(match[2] or match[3])
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
    text = _BLANKS.sub(" ", _EMPTY.sub(" ", _LOOKS.sub("", text))).rstrip("\\ ").strip()
    return _THOUSANDS_BY_BLANKS.sub(lambda match: match[0].replace(" ", ","), text)


def _is_variant(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<wide>", "<font>", "<noBreak>"))


def _without_ornaments(text: str) -> str:
    """The text without what may surround a number and leave it the number it is: a closing full stop, comma or
    semicolon, delimiters, fonts, the words "Answer:", a unit."""
    while True:
        inner = _without_unit(_without_lead(_unwrapped(_without_stop(text.strip("$ "))))).strip()
        if inner == text:
            return text
        text = inner


def _without_stop(text: str) -> str:
    ends = text.endswith((".", ",", ";")) and not text[:-1].endswith((".", ",", ";", "\\"))
    return text[:-1] if ends else text


def _unwrapped(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        if text == opening + inside + closing and opening not in inside and closing not in inside:
            return text if _LIST.match(text) else inside
    font = _FONT.match(text)
    start = font.end() if font else 0
    if font and _integer(text[start:]) is not None:
        return text[start:]
    if text.startswith("{", start) and text.endswith("}"):
        inside = text[start + 1 : -1]
        return inside if braced(text, start) == inside else text
    return text


def _without_lead(text: str) -> str:
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


def _without_unit(text: str) -> str:
    if symbol := _DEGREES_OR_PERCENT.search(text) or _ORDINAL.search(text):
        return text[: symbol.start()]
    power = _POWER.search(text)
    measured = text[: power.start()] if power else text
    number = _BEFORE_UNIT.search(measured)
    if number is None:
        return text
    words: list[str] = []
    end = number.end()
    while end < len(measured):
        unit = _UNIT.match(measured, end)
        if unit is None:
            return text
        end = unit.end()
        found = _WORD.findall(unit["font"] or unit["bare"] or "")
        glued = unit["bare"] is not None and not unit["bare"].startswith(" ")
        known = set(found) <= GLUED if glued else not found or is_unit(found, in_font=unit["font"] is not None)
        if not known:
            return text
        words += found
    if power and not (words and words[-1].lower() in LENGTHS):
        return text
    return text[: number.end()]


def plainly_equal(answer: str, label: str) -> bool | None:
    """Whether answer and label are equal, or None where that takes algebra."""
    if answer.strip() == label.strip():
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    integer = canonical_integer(label)
    return None if integer is None else equals_integer(read_answer(answer), integer)


def equals_integer(reading: Reading, integer: str) -> bool | None:
    """Whether what an answer says is the integer, in its canonical form; None where values must be computed first."""
    if not reading.is_number or any(number != integer for number in reading.integers):
        return False
    return None if reading.expressions else True
