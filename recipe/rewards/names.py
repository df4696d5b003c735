r"""Names of what a problem asks for, as they stand before `= 25`."""

import re
from collections.abc import Sequence

_FONTS = re.compile(r"\\(?:operatorname\*?|text\w*|math\w+|mbox|boldsymbol|bm|overline|hat|vec|bar)\s*\{([^{}]*)\}")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\\?[A-Za-z]+|\d)", re.ASCII)
_VALUES = r"-?(?:\d+|[A-Za-z]+)"
_LIST = rf"\s*\(\s*{_VALUES}(?:\s*,\s*{_VALUES})*\s*\)"
_ARGUMENTS = re.compile(rf"(?<=[A-Za-z']){_LIST}", re.ASCII)
_COMMANDS = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi"
    r"|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell|angle|measuredangle|triangle|max|min|gcd|lcm"
    r"|deg|cdot|times|[dt]?frac|prime)(?![a-zA-Z])"
)
_LETTERS = re.compile(r"[A-Za-z(\[{][A-Za-z'()\[\]{}+\-/*\s]*", re.ASCII)
_CHANGES_THE_VALUE = re.compile(
    r"(?:^|(?<=[\s({\[+\-*/]))(?:or|and|not|nor|no|if|mod|modulo|base|than|less|more|most|least|about|over|minus|plus"
    r"|point|half|third|quarter|twice|thrice|double|triple|hundred|thousand|million|billion|trillion|dozen|factorial"
    r"|square|squared|cube|cubed|root|sqrt|power|inverse|reciprocal|negative|negation|complement|one|two|three|four|five"
    r"|six|seven|eight|nine|ten|without|except|approximately|approx|roughly|around|nearly|almost|sin|cos|tan|cot|sec|csc"
    r"|arcsin|arccos|arctan|log|ln|exp|abs|floor|ceil|bound|bounds|estimate|estimated|guess|wrong|incorrect|false|other"
    r"|none|nothing|neither|never|cannot|can't|isn't|but|unless|fewer|under|above|below|between|unlike|opposite)(?![A-Za-z])",
    re.IGNORECASE,
)


_PART = re.compile(
    r"(?P<operation>\\(?:cdot|times|[dt]?frac)(?![a-zA-Z])|[+\-*/()\[\]{}])"
    rf"|(?P<base>\\?[A-Za-z]+)'*(?:{_SUBSCRIPT.pattern})?(?P<arguments>{_LIST})?",
    re.ASCII,
)
_NOT_SEEN = re.compile(r"[\s{}\\]")
_WEIGHTED = re.compile(r"(?:(?:10{1,3})?[A-Za-z](?:\+(?!$)|$))+", re.ASCII)
_SEGMENT = re.compile(r"(?:\||\\lvert)([A-Z])'*([A-Z])'*(?:\||\\rvert)", re.ASCII)


def is_name(text: str) -> bool:
    r"""Whether one side of an equation only names its value: a letter, a word, a value of a function (`f(3)`), the
    length of a segment (`|AB|`), or a sum, difference, product or fraction of those, as `m+n` in "find m+n", or a sum
    of letters with different powers of ten, as `100m+n`.

    A name has no other digits but in subscripts and arguments: `N-1 = 25` says that N is 26, `2x = 25` and `x^2 = 25`
    that x is something else again, and a reader cannot know which of them was asked for. For the same reason it names
    nothing twice: `N+N = 25` is `2N = 25`.
    """
    text = _FONTS.sub(r" \1 ", text)
    packed = "".join(text.split())
    if segment := _SEGMENT.fullmatch(packed):
        return segment[1] != segment[2]
    if _WEIGHTED.fullmatch(packed) and any(map(str.isdigit, packed)):
        terms = [(term[:-1], term[-1]) for term in packed.split("+")]
        return all(len(set(column)) == len(terms) > 1 for column in zip(*terms, strict=True))
    bare = _ARGUMENTS.sub("", _SUBSCRIPT.sub("", text))
    bare = _COMMANDS.sub(" x ", bare).strip()
    if not _LETTERS.fullmatch(bare) or not any(map(str.isalpha, bare)) or _CHANGES_THE_VALUE.search(bare):
        return False
    return _names_nothing_twice(text)


def _names_nothing_twice(text: str) -> bool:
    """Whether what stands between operations differs, down to subscripts and arguments, and no letter is multiplied by
    itself. Words of a phrase may stand twice (`area of the base of`)."""
    operands: list[list[re.Match[str]]] = [[]]
    for part in _PART.finditer(text):
        if part["operation"]:
            operands.append([])
        else:
            operands[-1].append(part)
    keys = ["".join(_NOT_SEEN.sub("", name[0]) for name in operand) for operand in operands if operand]
    return len(set(keys)) == len(keys) and not any(map(_is_square, operands))


def _is_square(operand: Sequence[re.Match[str]]) -> bool:
    """Whether a letter stands beside itself (`nn`, `N N`, `N(N)`)."""
    bases = [name["base"] for name in operand]
    letters = [name[0].strip() for name in operand if len(name["base"]) == 1 or name["base"].startswith("\\")]
    doubled = len(bases) == 1 and len(set(bases[0])) < len(bases[0]) and (len(bases[0]) <= 3 or len(set(bases[0])) == 1)
    applied = any(name["base"] in re.findall("[A-Za-z]+", name["arguments"] or "") for name in operand)
    return doubled or applied or len(set(letters)) < len(letters)


_ELLIPSIS = re.compile(r"\\[cl]?dots(?![a-zA-Z])|\.\.\.")
_OPERATION = re.compile(r"\\(?:cdot|times)(?![a-zA-Z])")
_INDEXED = re.compile(r"[A-Za-z]_ ?(?:\{[^{}]*\}|\w)", re.ASCII)
_COUNTED = re.compile(r"[\d\s+\-*/(),!^{}]*", re.ASCII)
_BIG_OPERATOR = re.compile(
    r"\\(?:sum|prod|i{0,2}int|lim|sup|inf)(?![a-zA-Z])(?:\s*[_^]\s*(?:\{[^{}]*\}|\\?\w+))*[^=<>]*", re.ASCII
)
_ROUNDED = re.compile(r"\\(?:lfloor ?(.*)\\rfloor|lceil ?(.*)\\rceil)")
_SQUARES = re.compile(r"[A-Z]{2} ?\^ ?(?:2|\{2\})(?: ?\+ ?[A-Z]{2} ?\^ ?(?:2|\{2\}))*", re.ASCII)
_APPLIED = re.compile(
    r"(?:[fghPE]|\\Pr|\\(?:mathbb|mathrm|operatorname)\{(?:E|P|Var|Pr)\})'* ?(?:\(([^()]*)\)|\[([^\[\]]*)\])"
)


def is_opaque(text: str) -> bool:
    r"""Whether one side of an equation can be nothing but what the other side is the value of, though it cannot be
    read: a sum with an ellipsis, a large operator (`\sum`, `\int`), a rounded name, squares of segments (`AB^2`), a
    function of anything (`P(A \cap B)`)."""
    text = text.strip()
    if _ELLIPSIS.search(text):
        counted = _OPERATION.sub("", _INDEXED.sub("", _ELLIPSIS.sub("", text)))
        is_long = "+" in text or _OPERATION.search(text) is not None
        return text[:1] not in ".\\" and _COUNTED.fullmatch(counted) is not None and is_long
    if rounded := _ROUNDED.fullmatch(text):
        return is_name(rounded[1] or rounded[2] or "")
    if squares := _SQUARES.fullmatch(text):
        names = re.findall("[A-Z]{2}", squares[0])
        return len(set(names)) == len(names) and all(name[0] != name[1] for name in names)
    return _BIG_OPERATOR.fullmatch(text) is not None or _APPLIED.fullmatch(text) is not None
