r"""Arithmetic in TeX, made explicit.

math-verify reads factors that stand side by side as a mixed number and adds them: `7(3)` is 10 to it, `2\binom{5}{2}`
is 12. So every product is written out before it sees an expression, and what is no expression by the grammar below does
not reach it.
"""

import re

MAX_CHARACTERS = 200
"""Longer arithmetic is no final answer, and takes math-verify's parser more time than it is worth."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.?|\S", re.ASCII | re.DOTALL)
_DIGITS = tuple("0123456789")
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "binom": 2, "dbinom": 2, "tbinom": 2, "sqrt": 1}
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac")
_CHOOSE = "\\choose"
_SIGNS = ("+", "-")
_OPERATORS = (*_SIGNS, "*", "/", "\\cdot", "\\times", "\\div", "\N{MULTIPLICATION SIGN}", "\N{DIVISION SIGN}", _CHOOSE)
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\lvert": "\\rvert", "|": "|"}
_CONSTANTS = ("\\pi",)
_FUNCTIONS = ("\\log", "\\ln")
_TIMES = "\\cdot"


class _NoArithmetic(Exception):
    """The text is no expression."""


def explicit(text: str) -> str | None:
    r"""An expression of numbers with every product written as `\cdot` and decimals as fractions; None if the text is
    none.

    The grammar: numbers, \pi, brackets, absolute values, floors, ceilings, fractions, roots, binomials, logarithms,
    factorials, powers, + - * /. A number before a fraction is refused: it may be a mixed number or a product.
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
        words: list[str] = []
        last = ""
        while (token := self._peek()) != closing or (token == "|" and _expects_value(last)):
            if token is None:
                raise _NoArithmetic
            last = self._next(token, last, words)
        if closing is not None:
            self._at += 1
        if _expects_value(last):
            raise _NoArithmetic
        if words.count(_CHOOSE) == 1:
            above, below = words[: words.index(_CHOOSE)], words[words.index(_CHOOSE) + 1 :]
            return f"\\binom{{{' '.join(above)}}}{{{' '.join(below)}}}"
        return " ".join(words)

    def _next(self, token: str, last: str, words: list[str]) -> str:
        """Reads what begins with `token` and adds it; `last` is the token before it. Returns the last token now."""
        if token in _OPERATORS:
            if _expects_value(last) and token not in _SIGNS:
                raise _NoArithmetic
            words.append(self._take())
            return token
        if token in ("^", "!"):
            if _expects_value(last):
                raise _NoArithmetic
            words[-1] += self._take() + (self._argument(short=False) if token == "^" else "")
            return ")"
        if not _expects_value(last):
            if last.endswith(_DIGITS) and (token.endswith(_DIGITS) or token in _FRACTIONS):
                raise _NoArithmetic
            words.append(_TIMES)
        return self._factor(token, words)

    def _factor(self, token: str, words: list[str]) -> str:
        self._at += 1
        if token.endswith(_DIGITS) or token in _CONSTANTS:
            words.append(_exact(token))
            return token
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


def _expects_value(last: str) -> bool:
    return last == "" or last in _OPERATORS or last in _FUNCTIONS
