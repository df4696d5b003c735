r"""The reader of answers and labels.

Both are read by the same rules, and whole: whatever is not known to mean nothing is part of the value, and what can be
read in two ways, or in part, is not read at all. Of an equation every side is a value but for names of what was asked
for (`m+n`, `f(3)`), on either side.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from recipe.rewards import congruences
from recipe.rewards.expressions import Tree, Unreadable, has_symbols, number, read_expression
from recipe.rewards.names import is_name, is_opaque
from recipe.rewards.ornaments import Peeled, peeled, unwrapped, without_choice
from recipe.rewards.plain import MAX_ANSWER_CHARACTERS, TEXT, plain
from recipe.rewards.splitting import has_list_in_brackets, split
from recipe.rewards.values import LIST, RECORD, STATEMENTS, UNION, Group, Number, Reading, Relation, Value, Words
from recipe.rewards.words import DOLLAR, NO_UNIT

_THOUSANDS = re.compile(r"(?<![\d.,a-zA-Z])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)", re.ASCII)
_JOIN = r"[, ]*(?:and|or|und|oder|et|ou|y|o)[, ]*"
_SEPARATOR = re.compile(
    rf"(?:[,;] ?)?(?:{TEXT} ?\{{{_JOIN}\}}|(?<=[\s\d)}}$])(?:and|or)(?=[\s\d\\(])|\\l(?:or|and)(?![a-zA-Z])|或者?|和)"
    r"|[,;]"
)
_OR = re.compile(r"\b(?:or|oder|ou|o)\b|\\lor|或")
_SIGN = re.compile(
    r":=|==|!=|<=|>=|\\not ?=|[=<>]|\\(?:neq?|leq?(?:slant)?|geq?(?:slant)?|lt|gt|in|subseteq|to|implies|iff|approx|sim"
    r"|simeq|cong|propto|mid|parallel|perp|notin|ni|(?:long)?(?:left)?rightarrow|Rightarrow|Leftrightarrow)(?![a-zA-Z])"
)
_LESS = {"<": "<", "\\lt": "<", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "<=": "<="}
_MORE = {">": "<", "\\gt": "<", "\\ge": "<=", "\\geq": "<=", "\\geqslant": "<=", ">=": "<="}
_EQUALS = ("=", ":=", "==")
_UNEQUAL = ("\\ne", "\\neq", "!=", "\\not=", "\\not =")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_WITHOUT = re.compile(r"\\(?:setminus|backslash)(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_SETS = re.compile(r"\\(?:mathbb|Bbb|mathbf) ?\{?([RZNQC])\}?(?:\^([+\-*]|\{[+\-*]\}))?")
_EMPTY_SET = re.compile(r"\\(?:emptyset|varnothing)|\\\{ ?\\\}|\{ ?\}")
_RATIO = re.compile(r"\d+(?: ?: ?\d+)+", re.ASCII)
_OPENING, _CLOSING = ("\\{", "\\langle", "(", "["), ("\\}", "\\rangle", ")", "]")
_DOLLARS = re.compile(r"\\\$ ?\d")
_IN_FONT = re.compile(rf"{TEXT} ?\{{([^{{}}$]*)\}}")
_ONLY_WORDS = re.compile(r"[^\W\d_][^\d\\$^_=<>{}()\[\]+*/|:;]*")
_SHORT_WORDS = frozenset(["yes", "no", "odd", "even", "dne", "all", "any", "none", "undefined", "both", "never"])
_INFINITY: Tree = ("constant", "inf")
_MAX_NESTED = 8


def read(text: str) -> Reading:
    """What a text says as a whole; without values, and with the reason, if that is not known."""
    if len(text) > MAX_ANSWER_CHARACTERS:
        return Reading(text, problem=f"is longer than {MAX_ANSWER_CHARACTERS:,} characters")
    return _read(text)


@lru_cache(1 << 14)
def _read(text: str) -> Reading:
    choice, rest = without_choice(plain(text))
    bare = peeled(rest).text
    if choice and not rest:
        return Reading(choice, choice=choice)
    try:
        values, name = _statement(rest)
    except Unreadable as problem:
        return Reading(bare, choice=choice, problem=str(problem))
    if _DOLLARS.search(text):
        values = tuple(map(_in_dollars, values))
    return Reading(bare, values, name, choice)


def _in_dollars(value: Value) -> Value:
    return replace(value, unit=DOLLAR) if isinstance(value, Number) and value.unit == NO_UNIT else value


Stated = tuple[tuple[Value, ...], str]
"""The values of the sides, and the name of what they are."""


def _statement(text: str) -> Stated:
    text = unwrapped(text)
    words = _as_words(text)
    if words is not None:
        return (words,), ""
    text = _without_thousands(text)
    parts, separators = split(text, _SEPARATOR)
    if len(parts) == 1:
        return _equation(text)
    return _listed([_equation(part) for part in parts], any(map(_OR.search, separators)))


def _without_thousands(text: str) -> str:
    """Without commas between thousands; those in brackets are a list's."""
    if has_list_in_brackets(text):
        return text
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _as_words(text: str) -> Words | None:
    """The words that a text consists of, or None."""
    without = _IN_FONT.sub(r" \1 ", text)
    if not _ONLY_WORDS.fullmatch(without.strip()):
        return None
    words = without.replace(",", " ").replace(".", " ").split()
    are_words = any(len(word) > 3 or word.lower() in _SHORT_WORDS or not word.isascii() for word in words)
    if not (are_words or (without != text and any(len(word) > 1 for word in words))) or "sqrt" in words:
        return None
    return Words(" ".join(words).casefold().removeprefix("the "))


def _listed(items: Sequence[Stated], alternatives: bool) -> Stated:
    """Several statements."""
    values = [_one_value(item) for item, _ in items]
    names = [name for _, name in items]
    if alternatives and all(isinstance(value, Group) and value.kind in _INTERVALS for value in values):
        return (Group(UNION, tuple(values)),), names[0]
    plain_values = all(
        isinstance(value, Number) or (isinstance(value, Group) and value.kind == "()") for value in values
    )
    if not plain_values:
        if any(isinstance(value, Words) for value in values):
            raise Unreadable("mixes words and values")
        return (Group(STATEMENTS, tuple(_named(*pair) for pair in zip(values, names, strict=True))),), ""
    if len(set(filter(None, names))) <= 1 and (names[0] or not any(names)):
        return (Group(LIST, tuple(values)),), names[0]
    if alternatives or not all(names):
        raise Unreadable("says several things of several names")
    records: list[dict[str, Value]] = [{}]
    for name, value in zip(names, values, strict=True):
        if name in records[-1]:
            records.append({})
        records[-1][name] = value
    groups = tuple(
        Group(RECORD, tuple(Group("pair", (Words(name), value)) for name, value in record.items()))
        for record in records
    )
    return (groups[0] if len(groups) == 1 else Group(LIST, groups),), ""


_INTERVALS = ("()", "(]", "[)", "[]", UNION)


def _one_value(values: tuple[Value, ...]) -> Value:
    if len(values) > 1:
        raise Unreadable("has an equation of several values in a list")
    return values[0]


def _named(value: Value, name: str) -> Value:
    return Group("pair", (Words(name), value)) if name else value


def _equation(text: str) -> Stated:
    """One statement: a value, an equation, a congruence or a relation."""
    text = unwrapped(text)
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return _both_signs(text)
    if congruences.is_congruence(text):
        return congruences.read(text)
    parts, signs = split(text, _SIGN)
    if not signs:
        return (_valued(peeled(text)),), ""
    if all(sign in _EQUALS for sign in signs):
        return _sides(parts if parts[0].strip() else parts[1:])
    if all(sign in _LESS for sign in signs):
        return _ordered(parts, [_LESS[sign] for sign in signs])
    if all(sign in _MORE for sign in signs):
        return _ordered(parts[::-1], [_MORE[sign] for sign in signs][::-1])
    if len(signs) == 1 and signs[0] in _UNEQUAL:
        return (Relation("!=", _valued(peeled(parts[0])), _valued(peeled(parts[1]))),), ""
    if signs == ["\\in"]:
        return _member(*parts)
    raise Unreadable(f"has {signs[0]!r}, or signs that do not go together")


def _both_signs(text: str) -> Stated:
    upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", text))
    lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", text))
    (plus, name), (minus, _) = _equation(upper), _equation(lower)
    return (Group(LIST, (_one_value(plus), _one_value(minus))),), name


def _sides(parts: Sequence[str]) -> Stated:
    """The values of an equation's sides."""
    numeric: list[Value] = []
    symbolic: list[Value] = []
    names: list[str] = []
    named: list[Value] = []
    for part in parts:
        side = peeled(part)
        is_named = len(parts) > 1 and (is_name(side.text) or is_opaque(side.text))
        try:
            value = _valued(side)
        except Unreadable:
            if not is_named:
                raise
            names.append(side.text)
            continue
        if isinstance(value, Words) and not is_named and len(parts) > 1:
            raise Unreadable("has words for a side of an equation")
        is_named = is_named or (len(parts) > 1 and isinstance(value, Group) and _is_symbolic(value))
        if is_named and (isinstance(value, Words) or _is_symbolic(value)):
            names.append(side.text)
            named.append(value)
        elif _is_symbolic(value) and isinstance(value, Number):
            symbolic.append(value)
        else:
            numeric.append(value)
    name = re.sub(r"[\s{}]", "", names[0]) if names else ""
    if numeric and not symbolic:
        return tuple(numeric), name
    if not numeric and names and symbolic and not any(_occurs(name, value) for value in symbolic):
        return tuple(symbolic), name
    sides = [*named, *symbolic, *numeric]
    if len(sides) == len(parts) == 2:
        return (Relation("=", sides[0], sides[1]),), ""
    raise Unreadable("is an equation without a value")


def _is_symbolic(value: Value) -> bool:
    match value:
        case Number(tree):
            return has_symbols(tree)
        case Group(_, items):
            return bool(items) and all(isinstance(item, Number) and item.tree[0] == "symbol" for item in items)
    return False


def _occurs(name: str, value: Value) -> bool:
    return isinstance(value, Number) and re.search(rf"'symbol', '{re.escape(name)}'", repr(value.tree)) is not None


def _ordered(parts: Sequence[str], signs: Sequence[str]) -> Stated:
    """What is stated by expressions that each are less than the next: an interval, or relations."""
    values = [_valued(peeled(part)) for part in parts]
    if not all(isinstance(value, Number) for value in values):
        raise Unreadable("orders what are no numbers")
    numbers = [value for value in values if isinstance(value, Number)]
    variables = [place for place, value in enumerate(numbers) if value.tree[0] == "symbol"]
    if not any(_is_symbolic(value) for value in numbers):
        raise Unreadable("compares numbers")
    if len(variables) == 1 and (len(parts) == 2 or (len(parts) == 3 and variables == [1])):
        place = variables[0]
        low = numbers[place - 1] if place else Number(("-", _INFINITY))
        high = numbers[place + 1] if place + 1 < len(numbers) else Number(_INFINITY)
        opening = "[" if place and signs[place - 1] == "<=" else "("
        closing = "]" if place < len(signs) and signs[place] == "<=" else ")"
        return (Group(opening + closing, (low, high)),), numbers[place].tree[1]
    relations = tuple(Relation(sign, numbers[at], numbers[at + 1]) for at, sign in enumerate(signs))
    return (relations[0] if len(relations) == 1 else Group(STATEMENTS, relations),), ""


def _member(left: str, right: str) -> Stated:
    member, of = _valued(peeled(left)), _valued(peeled(right))
    if isinstance(member, Number) and member.tree[0] == "symbol" and isinstance(of, Group):
        return (of,), member.tree[1]
    return (Relation("in", member, of),), ""


def _valued(side: Peeled, depth: int = 0) -> Value:
    """The value of what holds no relation, with its unit."""
    value = _value(side.text, depth)
    if isinstance(value, Number):
        tree = value.tree if side.scale == 1 else ("*", value.tree, number(side.scale))
        return replace(value, tree=tree, unit=side.unit)
    if isinstance(value, Group) and (side.scale != 1 or side.unit.measures):
        if value.kind == ":" or side.scale != 1:
            raise Unreadable("has a unit behind what is no number")
        return Group(
            value.kind,
            tuple(replace(item, unit=side.unit) if isinstance(item, Number) else item for item in value.items),
        )
    return value


def _value(text: str, depth: int) -> Value:
    if depth > _MAX_NESTED:
        raise Unreadable("is nested too deeply")
    if _EMPTY_SET.fullmatch(text):
        return Group(LIST, ())
    if match := _SETS.fullmatch(text):
        return Number(("symbol", f"\\mathbb{{{match[1]}}}{(match[2] or '').strip('{}')}"))
    for kind, sign in ((UNION, _CUP), ("without", _WITHOUT)):
        parts, signs = split(text, sign)
        if signs:
            return Group(kind, tuple(_valued(peeled(part), depth + 1) for part in parts))
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[2], depth)
    if _RATIO.fullmatch(text):
        return Group(":", tuple(Number(number(int(part))) for part in text.split(":")))
    if group := _bracketed(text, depth):
        return group
    return _as_words(text) or Number(read_expression(_without_thousands(text)))


def _bracketed(text: str, depth: int) -> Group | None:
    """A list in brackets that are around all of the text."""
    opening = next((bracket for bracket in _OPENING if text.startswith(bracket)), "")
    closing = next((bracket for bracket in _CLOSING if text.endswith(bracket)), "")
    if not opening or not closing:
        return None
    parts, commas = split(text[len(opening) : -len(closing)], re.compile("[,;]"))
    if not commas:
        return None
    items = tuple(_valued(peeled(part), depth + 1) for part in parts)
    match opening + closing:
        case "\\{\\}":
            return Group(LIST, items)
        case "\\langle\\rangle":
            return Group("()", items)
        case "()" | "(]" | "[)" | "[]" as kind:
            return Group(kind, items)
    return None


def _matrix(inside: str, depth: int) -> Group:
    rows = [row.split("&") for row in re.split(r"\\\\", inside.strip().removesuffix("\\\\"))]
    if len({len(row) for row in rows}) != 1:
        raise Unreadable("is a matrix of unequal rows")
    cells = tuple(_valued(peeled(cell), depth + 1) for row in rows for cell in row)
    return Group(f"matrix {len(rows)}x{len(rows[0])}", cells)
