r"""Names of what a problem asks for, as they stand before `= 25`."""

import re

_FONTS = re.compile(r"\\(?:operatorname\*?|text\w*|math\w+|mbox|boldsymbol|bm|overline|hat|vec|bar)\s*\{([^{}]*)\}")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\\?[A-Za-z]+|\d)", re.ASCII)
_VALUES = r"-?(?:\d+|[A-Za-z]+)"
_ARGUMENTS = re.compile(rf"(?<=[A-Za-z'])\s*\(\s*{_VALUES}(?:\s*,\s*{_VALUES})*\s*\)", re.ASCII)
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
    r"|arcsin|arccos|arctan|log|ln|exp|abs|floor|ceil)(?![A-Za-z])",
    re.IGNORECASE,
)


def is_name(text: str) -> bool:
    r"""Whether one side of an equation only names its value: a letter, a word, a value of a function (`f(3)`), or a
    sum, difference, product or fraction of those, as `m+n` in "find m+n".

    A name has no digits but in subscripts and arguments: `N-1 = 25` says that N is 26, `2x = 25` and `x^2 = 25` that x
    is something else again, and a reader cannot know which of them was asked for.
    """
    text = _FONTS.sub(r" \1 ", text)
    text = _ARGUMENTS.sub("", _SUBSCRIPT.sub("", text))
    text = _COMMANDS.sub(" x ", text).strip()
    return bool(_LETTERS.fullmatch(text)) and any(map(str.isalpha, text)) and not _CHANGES_THE_VALUE.search(text)
