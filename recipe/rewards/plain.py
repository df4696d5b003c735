"""Texts with what only changes their looks taken away: one spelling of characters, blanks and thousands."""

import re
import unicodedata

MAX_ANSWER_CHARACTERS = 1000
"""A longer answer is wrong unless it is the label itself."""

TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|math(?:bf|it|rm|sf|tt|normal)|operatorname|mbox|hbox)(?![a-zA-Z])"
)
"""The commands that set words in a formula."""

_LOOKS = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|[Ll]arge|LARGE|[Hh]uge|small|normalsize|bf|rm|it|bfseries|itshape|boldmath"
    r"|left|right|[Bb]igg?[lr]?|strut|mathstrut|limits|checkmark|square|blacksquare|qed)(?![a-zA-Z])"
    r"|\\color\s*(?:\[\w+\])?\s*\{\s*\w+\s*\}|\\(?=\$)|[✓✔√]\s*$|[\u200b-\u200f\u2060\ufeff]"
)
_END_TOKEN = re.compile(r"(?:\s*(?:<\|[a-z_]+\|>|</s>|<eos>))+\s*$")
_EMPTY = re.compile(TEXT + r"\s*\{[\s$~]*\}")
_BLANKS = re.compile(r"(?:(?<!\\)\\[ ,;:!>]|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)?space(?![a-zA-Z])|~|\s)+")
_THOUSANDS_BY_BLANKS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d,/]| /)", re.ASCII)
_INTEGER = re.compile(r"([+-]?) ?([1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.0*)?", re.ASCII)
_RANGE = re.compile("(?<=[0-9]) ?[\N{EN DASH}\N{EM DASH}] ?(?=[0-9])")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63", "-"))
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"√ ?(\d+(?:\.\d+)?|[a-zA-Z])", re.ASCII)
_SPELLED = {
    "×": r"\times ",  # noqa: RUF001
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≦": r"\le ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "≡": r"\equiv ",
    "≈": r"\approx ",
    "∞": r"\infty ",
    "∪": r"\cup ",  # noqa: RUF001
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "°": r"^\circ ",
    "\N{PRIME}": "'",
    "…": r"\ldots ",
    "⋯": r"\cdots ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "ℝ": r"\mathbb{R}",  # noqa: RUF001
    "ℤ": r"\mathbb{Z}",  # noqa: RUF001
    "ℕ": r"\mathbb{N}",  # noqa: RUF001
    "ℚ": r"\mathbb{Q}",  # noqa: RUF001
    "√": r"\sqrt ",
    "。": ".",
    "、": ",",
    "【": "[",
    "】": "]",
}
"""Characters of mathematics, and Chinese marks that NFKC leaves."""
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu xi pi rho sigma tau phi chi psi omega"
for _name in _GREEK.split():
    _SPELLED[unicodedata.lookup(f"GREEK SMALL LETTER {_name}")] = f"\\{_name.replace('lamda', 'lambda')} "


def plain(text: str) -> str:
    """The text with ASCII digits for full-width and bold ones (but not for circled ones, which mean something else),
    TeX for the characters of mathematics, one blank for TeX's many, commas between thousands, and without commands
    that change the looks alone and a model's end token."""
    text = _END_TOKEN.sub("", text)
    text = _LOOKS.sub("", text)
    if not text.isascii():
        text = _spelled(text)
    text = re.sub(r",\\! ?", ",", text.replace("{,}", ","))
    text = _BLANKS.sub(" ", _EMPTY.sub(" ", text)).rstrip("\\ ").strip()
    return _THOUSANDS_BY_BLANKS.sub(lambda match: match[0].replace(" ", ","), text)


def canonical_integer(text: str) -> str | None:
    r"""The integer that a text plainly is, without leading zeros, or None.

    Understands signs, thousands separators (`1,000`, `1{,}000`, `1\,000`, `1 000`), full-width digits, a fraction of
    zeros, a closing full stop and surrounding dollars or blanks. The number may be of any size: it is never converted.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    match = _INTEGER.fullmatch(plain(text).strip("$ "))
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def braced(text: str, start: int) -> str | None:
    r"""What is between the brace at `start` and the one that closes it (`\{` and `\}` are letters, not braces)."""
    depth = 0
    position = start
    while position < len(text):
        match text[position]:
            case "\\":
                position += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
                if depth == 0:
                    return text[start + 1 : position]
        position += 1
    return None


def _spelled(text: str) -> str:
    text = _RANGE.sub(" \\\\ldots ", text).translate(_DASHES)
    text = _RAISED.sub(lambda match: f"^{{{_folded(match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{_folded(match[0])}}}", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    return "".join(map(_character, text))


def _character(character: str) -> str:
    if character.isascii():
        return character
    if character in _SPELLED:
        return _SPELLED[character]
    kind = unicodedata.decomposition(character)
    if kind.startswith(("<wide>", "<font>", "<noBreak>", "<narrow>")):
        return _folded(character)
    if kind.startswith("<fraction>"):
        above, _, below = _folded(character).partition("\N{FRACTION SLASH}")
        return f"\\frac{{{above}}}{{{below}}}"
    return character


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_DASHES)
