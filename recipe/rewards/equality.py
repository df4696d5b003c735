"""Whether an answer plainly equals a label. What takes algebra is left to `recipe.rewards.algebra`."""

import re
import unicodedata

MAX_ANSWER_CHARACTERS = 1000
"""A longer answer is wrong unless it is the label itself."""

_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)\.?", re.ASCII)
_LATEX_COMMA = re.compile(r"\{,\}|,\\!|\\,")


def canonical_integer(text: str) -> str | None:
    r"""The integer that a text plainly is, without leading zeros, or None.

    Understands signs, thousands separators (`1,000`, `1{,}000`, `1\,000`), full-width digits, a closing full stop and
    surrounding dollars or blanks. The number may be of any size: it is never converted.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").strip().strip("$").strip()
    match = _INTEGER.fullmatch(_LATEX_COMMA.sub(",", plain))
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def plainly_equal(answer: str, label: str) -> bool | None:
    """Whether answer and label are equal, or None where that takes algebra."""
    if answer.strip() == label.strip():
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    integer, wanted = canonical_integer(answer), canonical_integer(label)
    if integer is None or wanted is None:
        return None
    return integer == wanted
