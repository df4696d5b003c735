r"""What may stand around an answer and leave it what it is: delimiters, fonts, "Answer:", a choice's letter, units."""

import re
from dataclasses import dataclass

from recipe.rewards.plain import TEXT, braced
from recipe.rewards.splitting import has_list_in_brackets
from recipe.rewards.words import DEGREE, NO_UNIT, PERCENT, Unit, raised, read_tail

_DELIMITERS = (
    ("\\(", "\\)"), ("\\[", "\\]"), ("\\{", "\\}"), ("(", ")"), ("[", "]"), ("**", "**"), ("__", "__"), ("`", "`"),
    ('"', '"'), ("“", "”"), ("\u2018", "\u2019"), ("「", "」"), ("$", "$"),
)  # fmt: skip
_BRACKETS = ("\\{", "(", "[")
_FONT = re.compile(
    rf"(?:\\(?:textcolor|colorbox)\s*(?:\[\w+\])?\s*\{{\s*\w+\s*\}}|{TEXT}"
    r"|\\(?:[bf]box|boxed|emph|underline|uline|boldsymbol|bm|pmb|[Bb]old|ensuremath)(?![a-zA-Z]))\s*"
)
_NUMBER = re.compile(r"[+-]?[\d.,]+", re.ASCII)
_LEAD_WORDS = (
    r"\s*(?:the\s)?(?:final\s|correct\s|required\s|desired\s)?(?:(?:answer|ans\.?|result)(?:\s(?:is|equals))?"
    r"|(?:remainder|sum|product|value|total|number|area|perimeter|volume|length|distance|count)(?:\s(?:is|equals)|(?=\s*[:=]))"
    r"|total|antwort|(?:la\s)?respuesta(?:\ses)?|(?:la\s)?r[ée]ponse(?:\sest)?|(?:a\s)?resposta(?:\sé)?|risposta|ответ|答え|답|(?:最终)?答案(?:是|为|為)?"
    r"|therefore|thus|hence|so)\s*[:=]?\s*"
)
_LEAD = re.compile(
    rf"(?:{TEXT}\s*\{{{_LEAD_WORDS}[.,]?\s*\}}\s*[:=]?|(?<!\\){_LEAD_WORDS})\s*(?=[^\sa-z])"
    r"|(?:(?:所以|因此|故)[,:]?)?(?:(?:最终)?(?:答案|结果)(?:是|为|為)?|共有?|总共|一共|总计)\s*[::]?\s*(?=[^\s:])",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    rf"{TEXT}\s*\{{\s*\(?(?P<font>[A-J])\)?\s*[.:)]?\s*\}}\s*[.:)]?|\((?P<round>[A-J])\)(?=\s|$)|(?P<bare>[A-J])\s*[.:)](?=\s)"
)
_PERCENT = re.compile(r"\s*\\?%$")
_DEGREES = re.compile(
    rf"\s*(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}})(?P<scale>\s*{TEXT}\s*\{{\s*[CF]\s*\}}|\s?[CF](?![a-z]))?"
    r"|\\degrees?(?![a-zA-Z])|\\textdegree(?![a-zA-Z]))$"
)
_ANGLE_OF = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ORDINAL = re.compile(rf"\s*\^\s*(?:\{{?\s*{TEXT}\s*\{{\s*(?:st|nd|rd|th)\s*\}}\s*\}}?|\{{\s*(?:st|nd|rd|th)\s*\}})$")
_POWER = re.compile(r"\s*\^\s*(?:([23])|\{\s*([23])\s*\})$")
_BEFORE_UNIT = re.compile(rf"(?:[\d)}}$]|\\pi(?![a-zA-Z]))(?=\s*{TEXT}|\s?[^\W\d_]|\s+\()")
_UNIT = re.compile(
    rf"\s*{TEXT}\s*\{{(?P<font>(?:[^{{}}\d\\$^]|\^[23])*)\}}|\s+\((?P<round>[^\W\d_][^\d\\(){{}}]*)\)"
    r"|(?P<bare>\s?[^\W\d_][^\d{}()\[\]=<>\\^_$*+,;!?:|]*)"
)


@dataclass(frozen=True)
class Peeled:
    """A text without its ornaments."""

    text: str
    unit: Unit = NO_UNIT
    scale: int = 1
    """What words behind the number multiply it by."""


def peeled(text: str) -> Peeled:
    """The text without what may surround a value, and the unit that it had. Raises nothing: what is left may be
    anything."""
    unit, scale = NO_UNIT, 1
    while True:
        inner, found, times = _without_unit(_without_lead(unwrapped(text)))
        inner = inner.strip()
        scale *= times
        unit = found if unit == NO_UNIT else unit
        if inner == text:
            return Peeled(text, unit, scale)
        text = inner


def unwrapped(text: str) -> str:
    """The text without what closes a sentence, and without delimiters and fonts around all of it."""
    while True:
        inner = _unwrapped_once(_without_stop(text.strip().strip("$").strip())).strip()
        if inner == text:
            return text
        text = inner


def without_choice(text: str) -> tuple[str, str]:
    """The letter of a multiple choice in front of a text, or the empty text, and what follows it."""
    text = unwrapped(text)
    choice = _CHOICE.match(text)
    if choice is None:
        return ("", text) if len(text) != 1 or not "A" <= text <= "J" else (text, "")
    return choice["font"] or choice["round"] or choice["bare"], text[choice.end() :].strip()


def _without_stop(text: str) -> str:
    ends = text.endswith((".", ",", ";")) and not text[:-1].endswith((".", ",", ";", "\\"))
    return text[:-1] if ends else text


def _unwrapped_once(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        if (
            len(text) > len(opening)
            and text == opening + inside + closing
            and opening not in inside
            and closing not in inside
        ):
            is_list = opening in _BRACKETS and has_list_in_brackets(text)
            return text if is_list or not inside else inside
    font = _FONT.match(text)
    start = font.end() if font else 0
    if font and _NUMBER.fullmatch(text[start:]):
        return text[start:]
    if text.startswith("{", start) and text.endswith("}"):
        inside = text[start + 1 : -1]
        return inside if braced(text, start) == inside else text
    return text


def _without_lead(text: str) -> str:
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


def _without_unit(text: str) -> tuple[str, Unit, int]:
    """The text without a unit behind it, the unit, and what its words multiply the number by."""
    if match := _PERCENT.search(text):
        return text[: match.start()], PERCENT, 1
    if (match := _DEGREES.search(text)) and not _ANGLE_OF.search(text):
        scale = (match["scale"] or "").strip("} ")[-1:]
        return text[: match.start()], {"C": Unit(("celsius",)), "F": Unit(("fahrenheit",))}.get(scale, DEGREE), 1
    if match := _ORDINAL.search(text):
        return text[: match.start()], NO_UNIT, 1
    power = _POWER.search(text)
    measured = text[: power.start()] if power else text
    for number in _BEFORE_UNIT.finditer(measured):
        found = _units(measured, number.end(), power)
        if found is not None:
            return text[: number.end()], *found
    return text, NO_UNIT, 1


def _units(text: str, start: int, power: re.Match[str] | None) -> tuple[Unit, int] | None:
    """What stands from `start` on, if it is nothing but units."""
    words: list[str] = []
    in_font = glued = False
    end = start
    while end < len(text):
        match = _UNIT.match(text, end)
        if match is None:
            return None
        in_font = in_font or match["font"] is not None
        glued = glued or (match["bare"] is not None and not match["bare"].startswith(" ") and end == start)
        if match["bare"] is not None and in_font and len(match["bare"].strip()) == 1:
            return None
        words.append(match["font"] or match["bare"] or match["round"] or "")
        end = match.end()
    tail = read_tail(" ".join(words), in_font=in_font, glued=glued)
    if tail is None:
        return None
    if power is None:
        return tail.unit, tail.scale
    unit = raised(tail.unit, power[1] or power[2], " ".join(words))
    return None if unit is None else (unit, tail.scale)
