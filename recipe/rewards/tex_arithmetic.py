r"""Arithmetic in TeX, made explicit.

math-verify reads factors that stand side by side as a mixed number and adds them: `7(3)` is 10 to it, `2\binom{5}{2}`
is 12. So every product is written out before it sees an expression, and what is no expression by the grammar below does
not reach it.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

MAX_CHARACTERS = 200
"""Longer arithmetic is no final answer, and takes math-verify's parser more time than it is worth."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.?|\S", re.ASCII | re.DOTALL)
_DIGITS = tuple("0123456789")
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "binom": 2, "dbinom": 2, "tbinom": 2, "sqrt": 1}
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac")
_CHOOSE = "\\choose"
_SIGNS = ("+", "-")
_OPERATORS = (*_SIGNS, "*", "/", "\\cdot", "\\times", "\\div", "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}", _CHOOSE)
_BRACKETS = {"(": ")", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\lvert": "\\rvert", "|": "|"}
_CONSTANTS = ("\\pi",)
_FUNCTIONS = ("\\log", "\\ln")
_OVER = ("/", "\\div", "\N{DIVISION SIGN}")
_RAISING = ("^", "!")
_ROUND = "( "
"""How a word in round brackets begins."""
_TIMES = "\\cdot"


class _NoArithmetic(Exception):
    """The text is no expression."""


def explicit(text: str) -> str | None:
    r"""An expression of numbers with every product written as `\cdot` and decimals as fractions; None if the text is
    none.

    The grammar: numbers, \pi, brackets, absolute values, floors, ceilings, fractions, roots, binomials, logarithms,
    factorials, powers, + - * /. What has two readings is refused: a number before a fraction (a mixed number or a
    product), a factor or power behind a logarithm (`\log 1000/10`), a factor side by side with a divisor (`8/2(4)`), a
    power or factorial of a power or factorial (`2^{3}!`, and `3!!`, which is no (3!)!), and a sum or product in braces,
    which are not seen in print (`5\cdot{2+3}`).
    """
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        return _Reader(_TOKEN.findall(text)).expression(None)
    except _NoArithmetic:
        return None


class _Reader:
    """Reads tokens from the left."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    def expression(self, closing: str | None) -> str:
        """What comes before `closing`, which is read too; None: everything."""
        return " ".join(self._words(closing))

    def _words(self, closing: str | None) -> list[str]:
        words: list[str] = []
        last = ""
        while (token := self._peek()) != closing or (token == "|" and _expects_value(last)):
            if token is None:
                raise _NoArithmetic
            last = self._next(token, last, words)
        if closing is not None:
            self._at += 1
        if _expects_value(last) or words.count(_CHOOSE) > 1:
            raise _NoArithmetic
        if _CHOOSE in words:
            above, below = words[: words.index(_CHOOSE)], words[words.index(_CHOOSE) + 1 :]
            return [f"\\binom{{{' '.join(above)}}}{{{' '.join(below)}}}"]
        return words

    def _next(self, token: str, last: str, words: list[str]) -> str:
        """Reads what begins with `token` and adds it; `last` is the token before it. Returns the last token now."""
        if token in _SIGNS:
            if last in _FUNCTIONS:
                raise _NoArithmetic
            words.append(self._take())
            return token
        if token in _OPERATORS:
            if _expects_value(last) or _ends_in_function(words):
                raise _NoArithmetic
            words.append(self._take())
            return token
        if token in _RAISING:
            if _expects_value(last) or last in _RAISING or _is_applied(words):
                raise _NoArithmetic
            words[-1] += self._take() + (self._argument(short=False) if token == "^" else "")
            return token
        if not _expects_value(last):
            digits_meet = last.endswith(_DIGITS) and (token.endswith(_DIGITS) or token in _FRACTIONS)
            if digits_meet or _ends_in_function(words) or any(word in _OVER for word in _last_term(words)):
                raise _NoArithmetic
            words.append(_TIMES)
        return self._factor(token, words)

    def _factor(self, token: str, words: list[str]) -> str:
        self._at += 1
        if token.endswith(_DIGITS) or token in _CONSTANTS:
            words.append(_exact(token))
            return token
        if token == "{":
            inside = self._words("}")
            if len(inside) > 1 or any(sign in inside[0] for sign in _RAISING):
                raise _NoArithmetic
            words.append(f"{{ {inside[0]} }}")
            return ")"
        if token in _BRACKETS:
            words.append(f"{token} {self.expression(_BRACKETS[token])} {_BRACKETS[token]}")
            return ")"
        if token in _FUNCTIONS:
            base = self._take() + self._argument() if self._peek() == "_" else ""
            words.append(token + base)
            return token
        count = _ARGUMENTS.get(token.removeprefix("\\"))
        if count is None:
            raise _NoArithmetic
        root = ""
        if token == "\\sqrt" and self._peek() == "[":
            self._at += 1
            root = f"[{self.expression(']')}]"
        words.append(token + root + "".join(self._argument() for _ in range(count)))
        return ")"

    def _argument(self, *, short: bool = True) -> str:
        """A group or a number, in braces; if `short`, only the first digit of a number, as in TeX."""
        token = self._take()
        if token == "{":
            return f"{{{self.expression('}')}}}"
        if not token.endswith(_DIGITS):
            raise _NoArithmetic
        if short and len(token) > 1:
            self._at -= 1
            self._tokens[self._at] = token[1:]
            token = token[0]
        return f"{{{_exact(token)}}}"

    def _peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str:
        token = self._peek()
        if token is None:
            raise _NoArithmetic
        self._at += 1
        return token


def _exact(number: str) -> str:
    whole, point, rest = number.partition(".")
    return f"(\\frac{{{whole}{rest}}}{{1{'0' * len(rest)}}})" if point else number


def _last_term(words: Sequence[str]) -> Sequence[str]:
    """What stands behind the last sign."""
    return words[max((at for at, word in enumerate(words) if word in _SIGNS), default=-1) + 1 :]


def _is_applied(words: Sequence[str]) -> bool:
    """Whether the last word is a function's whole argument, in brackets."""
    return len(words) > 1 and words[-2].startswith(_FUNCTIONS) and words[-1].startswith(_ROUND)


def _ends_in_function(words: Sequence[str]) -> bool:
    """Whether what stands behind the words may belong to the argument of a function in their last term, which no round
    brackets hold together."""
    return any(
        word.startswith(_FUNCTIONS) and not argument.startswith(_ROUND)
        for word, argument in pairwise(_last_term(words))
    )


def _expects_value(last: str) -> bool:
    return last == "" or last in _OPERATORS or last in _FUNCTIONS
