r"""Expressions in TeX, read into trees.

A tree is a tuple whose first item says what it is: `("number", 3, 7)`, `("symbol", "x")`, `("constant", "pi")`,
`("+", a, b, ...)`, `("*", a, b, ...)`, `("/", a, b)`, `("-", a)`, `("^", a, b)`, `("call", function, a, ...)`, or
`("open", call)` of a function whose argument has no brackets.

What has two readings is refused: a factor or power behind a function without brackets (`\log 1000/10`), a factor side
by side with a divisor (`8/2(4)`), a power or factorial of a power or factorial (`2^{3}!`, and `3!!`, which is no
(3!)!), and a sum or product in braces, which are not seen in print (`5\cdot{2+3}`).
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]

MAX_CHARACTERS = 400
"""A longer expression is no final answer."""
MAX_DEPTH = 40

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.?|\S", re.ASCII | re.DOTALL)
_TIMES = ("*", "\\cdot", "\\times", "\\ast")
_OVER = ("/", "\\div")
_SIGNS = ("+", "-")
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac")
_BINOMIALS = ("\\binom", "\\dbinom", "\\tbinom")
_BRACKETS = {"(": ")", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\lvert": "\\rvert", "|": "|"}
_AROUND = {"\\lfloor": "floor", "\\lceil": "ceil", "\\lvert": "abs", "|": "abs"}
_CONSTANTS = {"\\pi": "pi", "e": "e", "i": "i", "\\infty": "inf"}
_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
_FUNCTIONS = {f"\\{name}": name for name in (*_TRIGONOMETRIC, "log", "ln", "lg", "exp", "gcd", "lcm", "max", "min")}
_PLAIN_NAMES = re.compile(
    r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|gcd|lcm|pi|max|min|floor|ceil|abs)"
    r"(?=[^a-zA-Z]|$)"
)
_SYMBOLS = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau"
    r"|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell)"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|dot|bar|overdot) ?(?:\{(\d+)\}|(\d))", re.ASCII)
_MAX_BASE = 36


class Unreadable(Exception):
    """The text is nothing that can be compared; the message says why, as the end of a sentence."""


def number(value: Fraction | int) -> Tree:
    value = Fraction(value)
    return ("number", value.numerator, value.denominator)


def read_expression(text: str) -> Tree:
    """The tree of a text that is an expression as a whole. Raises Unreadable if it is none."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"has more than {MAX_CHARACTERS} characters")
    text = _REPEATING.sub(_repeating, _PLAIN_NAMES.sub(r"\\\1 ", text))
    text = re.sub(
        r"\\(?:mathrm|text|operatorname) ?\{ ?(e|i|\\pi|[a-z]*(?:sin|cos|tan|log|ln|exp|gcd|lcm)) ?\}", _known, text
    )
    return _Reader(text).whole()


def has_symbols(tree: Tree) -> bool:
    return tree[0] == "symbol" or any(has_symbols(part) for part in tree[1:] if isinstance(part, tuple))


def _is_number(token: str) -> bool:
    return token[-1] in "0123456789" and token[0] != "\\"


def _known(match: re.Match[str]) -> str:
    return f"\\{match[1]} " if len(match[1]) > 1 and not match[1].startswith("\\") else f" {match[1]} "


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    below = (10 ** len(period) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + period) - int(whole + fixed)
    return f"({above}/{below})"


class _Reader:
    """Reads tokens from the left."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text)
        self._at = 0
        self._depth = 0
        self._bars = 0
        """Absolute values that are open."""

    def whole(self) -> Tree:
        tree = self._sum(())
        if self._at < len(self._tokens):
            raise Unreadable(f"has {self._tokens[self._at]!r} where nothing can be read")
        return tree

    def _peek(self, ahead: int = 0) -> str | None:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else None

    def _take(self, wanted: str | None = None) -> str:
        token = self._peek()
        if token is None or (wanted is not None and token != wanted):
            raise Unreadable(f"lacks {wanted!r}" if wanted else "ends too early")
        self._at += 1
        return token

    def _sum(self, closing: tuple[str, ...]) -> Tree:
        """Terms up to one of the closing tokens, or as far as can be read."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("is nested too deeply")
        terms = [self._signed_term(closing)]
        while self._peek() in _SIGNS:
            terms.append(self._signed_term(closing))
        self._depth -= 1
        if self._peek() == "\\choose":
            self._take()
            if any(self._is_open_function(term) for term in terms):
                raise Unreadable("has \\choose behind a function without brackets")
            below = self._sum(closing)
            if below[:2] == ("call", "binom"):
                raise Unreadable("has \\choose twice")
            return ("call", "binom", _joined("+", terms), below)
        return _joined("+", terms)

    def _signed_term(self, closing: tuple[str, ...]) -> Tree:
        negative = False
        while self._peek() in _SIGNS:
            negative ^= self._take() == "-"
        term = self._term(closing)
        return ("-", term) if negative else term

    def _term(self, closing: tuple[str, ...]) -> Tree:
        """Factors and divisors from the left."""
        tree = self._factor()
        divided = False
        while (token := self._peek()) is not None and token not in closing and token not in _SIGNS:
            if token in _TIMES or token in _OVER:
                if self._is_open_function(tree):
                    raise Unreadable("has a factor behind a function without brackets")
                self._take()
                negative = False
                while self._peek() in _SIGNS:
                    negative ^= self._take() == "-"
                factor = self._factor()
                tree = ("*", tree, factor) if token in _TIMES else ("/", tree, factor)
                tree = ("-", tree) if negative else tree
                divided = divided or token in _OVER
            elif self._begins_factor(token):
                self._check_neighbours(tree, token, divided)
                tree = ("*", tree, self._factor())
            else:
                break
        return tree

    def _is_open_function(self, tree: Tree) -> bool:
        """Whether a tree ends in a function whose argument has no brackets, to which what follows might belong."""
        last = tree[-1] if tree[0] in ("*", "/", "-") else tree
        return last[0] == "open"

    def _check_neighbours(self, tree: Tree, token: str, divided: bool) -> None:
        if divided:
            raise Unreadable("has a factor side by side with a divisor")
        if self._is_open_function(tree) and _FUNCTIONS.get(token) not in _TRIGONOMETRIC:
            raise Unreadable("has a factor behind a function without brackets")
        before = self._tokens[self._at - 1]
        if _is_number(token) and (_is_number(before) or before.isalpha() or _SYMBOLS.fullmatch(before)):
            raise Unreadable("has numbers side by side")
        if _is_number(before) and token in _FRACTIONS:
            raise Unreadable("has a number before a fraction")

    def _begins_factor(self, token: str) -> bool:
        return (
            _is_number(token)
            or token in (*_FRACTIONS, *_BINOMIALS, *_FUNCTIONS, "\\sqrt", "{", "\\floor", "\\ceil", "\\abs")
            or (token in _BRACKETS and token != "|")
            or (token == "|" and self._bars == 0)
            or token in _CONSTANTS
            or (len(token) == 1 and token.isascii() and token.isalpha())
            or _SYMBOLS.fullmatch(token) is not None
        )

    def _factor(self) -> Tree:
        """A value with its powers and factorials."""
        token = self._take()
        tree, is_raised = self._value(token)
        if self._peek() == "_" and _is_number(token):
            tree = self._in_base(token)
        while (token := self._peek() or "") in ("^", "!"):
            if is_raised or tree[0] == "open" or (tree[0] == "call" and tree[1] in _FUNCTIONS.values()):
                raise Unreadable("has a power or factorial of a power, a factorial or a function")
            self._take()
            if token == "!":
                tree, is_raised = ("call", "factorial", tree), True
            elif self._is_degree():
                tree = ("call", "degree", tree)
            else:
                tree, is_raised = ("^", tree, self._argument(short=False)), True
        return tree

    def _is_degree(self) -> bool:
        if self._peek() == "\\circ":
            self._take()
            return True
        if [self._peek(0), self._peek(1), self._peek(2)] == ["{", "\\circ", "}"]:
            self._at += 3
            return True
        return False

    def _value(self, token: str) -> tuple[Tree, bool]:
        """What begins with the token, which is taken; and whether a power of it has two readings."""
        if _is_number(token):
            return self._mixed(Fraction(token)), False
        if token in _CONSTANTS:
            return ("constant", _CONSTANTS[token]), False
        if token == "{":
            tree = self._sum(("}",))
            self._take("}")
            if tree[0] in ("+", "*", "/", "-"):
                raise Unreadable("has a sum or product in braces, which are not seen in print")
            return tree, tree[0] in ("^",) or tree[:2] == ("call", "factorial")
        if token in _BRACKETS:
            return self._bracketed(token), False
        if token in ("\\floor", "\\ceil", "\\abs"):
            self._take("(")
            return ("call", token[1:], self._bracketed("(")), False
        if token in _FUNCTIONS:
            return self._function(_FUNCTIONS[token]), False
        if token in _FRACTIONS:
            return ("/", self._argument(), self._argument(last=True)), True
        if token in _BINOMIALS:
            return ("call", "binom", self._argument(), self._argument(last=True)), False
        if token == "\\sqrt":
            return self._root(), False
        if token == "C" and self._peek() == "(" and "," in self._tokens[self._at : self._at + 4]:
            return ("call", "binom", *self._arguments()), False
        if (len(token) == 1 and token.isascii() and token.isalpha()) or _SYMBOLS.fullmatch(token):
            return self._symbol(token), False
        raise Unreadable(f"has {token!r} where a value should be")

    def _mixed(self, whole: Fraction) -> Tree:
        """A number, or a mixed one: with a proper fraction behind it."""
        here = self._at
        if whole.denominator == 1 and "." not in self._tokens[here - 1]:
            fraction: Callable[[], Tree] | None = None
            following = self._peek() or ""
            if following in _FRACTIONS:
                fraction = self._plain_fraction
            elif following.isdigit() and self._peek(1) == "/" and (self._peek(2) or "").isdigit():
                fraction = self._slashed
            if fraction is not None:
                part = fraction()
                if part[0] != "number" or not 0 < Fraction(part[1], part[2]) < 1:
                    raise Unreadable("has a number before a fraction")
                return number(whole + Fraction(part[1], part[2]))
        return number(whole)

    def _plain_fraction(self) -> Tree:
        self._take()
        above, below = self._argument(), self._argument(last=True)
        if above[0] == below[0] == "number" and above[2] == below[2] == 1 and below[1] > 0:
            return number(Fraction(above[1], below[1]))
        raise Unreadable("has a number before a fraction")

    def _slashed(self) -> Tree:
        above, _, below = self._take(), self._take(), self._take()
        if int(below) == 0:
            raise Unreadable("divides by zero")
        return number(Fraction(int(above), int(below)))

    def _bracketed(self, opening: str) -> Tree:
        closing = _BRACKETS[opening]
        self._bars, bars = (self._bars + 1 if opening == "|" else 0), self._bars
        tree = self._sum((closing,))
        self._take(closing)
        self._bars = bars
        if self._is_open_function(tree):
            tree = ("+", tree)
        return ("call", _AROUND[opening], tree) if opening in _AROUND else tree

    def _arguments(self) -> list[Tree]:
        """A list in round brackets."""
        self._take("(")
        found = [self._sum((",", ")"))]
        while self._peek() == ",":
            self._take()
            found.append(self._sum((",", ")")))
        self._take(")")
        return found

    def _function(self, name: str) -> Tree:
        if name in ("gcd", "lcm", "max", "min"):
            return ("call", name, *self._arguments())
        base, power = None, None
        while (token := self._peek()) in ("_", "^"):
            self._take()
            if token == "_":
                base = self._argument()
            else:
                power = self._argument(short=False)
        if name in _TRIGONOMETRIC and power == ("-", number(1)):
            name, power = f"arc{name}", None
        tree, is_open = self._function_argument()
        call: Tree = ("call", name, tree) if base is None else ("call", name, tree, base)
        call = call if power is None else ("^", call, power)
        return ("open", call) if is_open else call

    def _function_argument(self) -> tuple[Tree, bool]:
        """The argument of a function, and whether it has no brackets."""
        token = self._peek()
        if token == "(":
            self._take()
            return self._bracketed("("), False
        if token is None or token in _FUNCTIONS:
            raise Unreadable("has a function without an argument")
        factors = [self._factor()]
        while (token := self._peek()) is not None and (
            (len(token) == 1 and token.isalpha()) or token == "\\pi" or _SYMBOLS.fullmatch(token)
        ):
            factors.append(self._factor())
        return _joined("*", factors), True

    def _root(self) -> Tree:
        order: Tree | None = None
        if self._peek() == "[":
            self._take()
            order = self._sum(("]",))
            self._take("]")
        if self._peek() == "(":
            self._take()
            inside = self._bracketed("(")
        else:
            inside = self._argument(last=True)
        return ("call", "root", inside, order or number(2))

    def _in_base(self, digits: str) -> Tree:
        self._take("_")
        base = self._argument()
        if base[0] != "number" or base[2] != 1 or not 2 <= base[1] <= _MAX_BASE or not digits.isdigit():
            raise Unreadable("has an index at a number that is no base")
        if any(int(digit) >= base[1] for digit in digits):
            raise Unreadable("has a digit that its base does not have")
        return number(int(digits, base[1]))

    def _symbol(self, name: str) -> Tree:
        """A variable with its index and primes."""
        while self._peek() == "'":
            name += self._take()
        if self._peek() == "_":
            self._take()
            depth, index = 0, ""
            while True:
                token = self._take()
                depth += (token == "{") - (token == "}")
                index += token if token not in "{}" else ""
                if depth == 0:
                    break
            name += f"_{index}"
        return ("symbol", name)

    def _argument(self, *, short: bool = True, last: bool = False) -> Tree:
        """A group, a number or a variable; if `short`, only the first digit of a number, as in TeX, whose others must
        not be left over behind the `last` argument."""
        token = self._take()
        if token == "{":
            tree = self._sum(("}",))
            self._take("}")
            return tree
        if token == "-" and not short and (self._peek() or "").isdigit():
            return ("-", number(int(self._take())))
        if _is_number(token):
            if short and len(token) > 1:
                if last or "." in token:
                    raise Unreadable("has digits behind an argument without braces")
                self._at -= 1
                self._tokens[self._at] = token[1:]
                token = token[0]
            return number(Fraction(token))
        if token in _CONSTANTS:
            return ("constant", _CONSTANTS[token])
        if (len(token) == 1 and token.isascii() and token.isalpha()) or _SYMBOLS.fullmatch(token):
            return ("symbol", token)
        if token == "(" and not short:
            return self._bracketed("(")
        if token in _FRACTIONS or token == "\\sqrt":
            return self._value(token)[0]
        raise Unreadable(f"has {token!r} where an argument should be")


def _joined(operator: str, parts: list[Tree]) -> Tree:
    return parts[0] if len(parts) == 1 else (operator, *parts)
