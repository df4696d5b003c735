"""Whether two readings say the same."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from recipe.rewards.exact import TooLarge, rational
from recipe.rewards.expressions import Tree, has_symbols, number
from recipe.rewards.reading import read
from recipe.rewards.values import MODULAR, UNORDERED, Group, Number, Reading, Relation, Value, Words
from recipe.rewards.words import NO_UNIT, PERCENT

_INTEGER_MODULUS = 1000
"""AIME asks for remainders by it: there a residue is the answer, and elsewhere it is not a number."""
_APPLICATION = re.compile(r"(\\?[A-Za-z]+)(\(.*\)|_.*)")


class NeedsAlgebra(Exception):
    """Trees whose values are not both rational."""


@dataclass(frozen=True)
class TreeRules:
    """How trees are compared."""

    same: Callable[[Tree, Tree], bool]
    proportional: Callable[[Tree, Tree, bool], bool]
    """Whether two trees differ by a constant factor that is not zero, which must be positive if told so."""


def plainly_equal(answer: str, label: str) -> bool | None:
    """Whether answer and label are equal, or None where that takes algebra."""
    return answer.strip() == label.strip() or readings_equal(read(answer), read(label))


def readings_equal(answer: Reading, label: Reading) -> bool | None:
    """Whether two readings are equal, or None where that takes algebra."""
    try:
        return equal(answer, label, PLAIN)
    except NeedsAlgebra:
        return None


def equal(answer: Reading, label: Reading, rules: TreeRules) -> bool:
    """Whether every value of an answer is every value of the label; never so of what cannot be read."""
    if answer.choice and label.choice and answer.choice != label.choice:
        return False
    if not answer.values or not label.values:
        return answer.choice == label.choice != "" and not answer.problem and not label.problem
    if _other_application(answer.name, label.name):
        return False
    return all(_same(a, b, rules, answer.name, label.name) for a in answer.values for b in label.values)


def values_differ(values: Sequence[Value]) -> bool:
    """Whether two of the values plainly differ."""
    try:
        return not all(_same(values[0], value, PLAIN) for value in values[1:])
    except NeedsAlgebra:
        return False


def _other_application(left: str, right: str) -> bool:
    """Whether two names are the same function at two places, or the same letter with two indices."""
    a, b = _APPLICATION.fullmatch(left), _APPLICATION.fullmatch(right)
    return a is not None and b is not None and a[1] == b[1] and a[2] != b[2]


def _same(left: Value, right: Value, rules: TreeRules, left_name: str = "", right_name: str = "") -> bool:
    match left, right:
        case Number(), Number():
            return _same_number(left, right, rules)
        case Words(a), Words(b):
            return a == b
        case Group(), Group():
            return _same_group(left, right, rules)
        case Relation(), Relation():
            return _same_relation(left, right, rules)
        case (Group(kind=k, items=(Number() as residue, Number(modulus))), Number()) if k == MODULAR:
            return _is_remainder(residue, modulus) and _same_number(residue, right, rules)
        case (Number(), Group(kind=k, items=(Number() as residue, Number(modulus)))) if k == MODULAR:
            return _is_remainder(residue, modulus) and _same_number(left, residue, rules)
        case Number(tree), Relation(sign="=") if left_name and has_symbols(tree):
            return _same_relation(_defined(left_name, left), right, rules)
        case Relation(sign="="), Number(tree) if right_name and has_symbols(tree):
            return _same_relation(left, _defined(right_name, right), rules)
    return False


def _is_remainder(residue: Number, modulus: Tree) -> bool:
    value = rational(residue.tree)
    return rational(modulus) == _INTEGER_MODULUS and value is not None and 0 <= value < _INTEGER_MODULUS


def _defined(name: str, value: Number) -> Relation:
    return Relation("=", Number(("symbol", name)), value)


def _same_number(left: Number, right: Number, rules: TreeRules) -> bool:
    if not left.unit.agrees(right.unit):
        return False
    for one, other in ((left, right), (right, left)):
        if one.unit == PERCENT and other.unit == NO_UNIT:
            return _is_percentage(one.tree, other.tree, rules)
    return rules.same(left.tree, right.tree)


def _is_percentage(percents: Tree, tree: Tree, rules: TreeRules) -> bool:
    """Whether so many percent are a number: a hundredth of it, or, where that is no share of one, the number itself, as
    problems ask for percents."""
    value = _rational_or_none(tree)
    is_share = value is not None and -1 < value < 1 and value != 0
    return (not is_share and rules.same(percents, tree)) or rules.same(("/", percents, number(100)), tree)


def _rational_or_none(tree: Tree) -> Fraction | None:
    try:
        return rational(tree)
    except TooLarge:
        return None


def _same_group(left: Group, right: Group, rules: TreeRules) -> bool:
    if left.kind == right.kind == MODULAR:
        return _same_residue(left, right)
    if left.kind != right.kind or len(left.items) != len(right.items):
        return False
    if left.kind not in UNORDERED:
        return all(_same(a, b, rules) for a, b in zip(left.items, right.items, strict=True))
    unmatched = list(right.items)
    for item in left.items:
        found = next((place for place, other in enumerate(unmatched) if _same(item, other, rules)), None)
        if found is None:
            return False
        del unmatched[found]
    return True


def _same_residue(left: Group, right: Group) -> bool:
    (a, modulus), (b, other) = (tuple(map(_integer, group.items)) for group in (left, right))
    return modulus == other and (a - b) % modulus == 0


def _integer(value: Value) -> int:
    assert isinstance(value, Number)
    found = rational(value.tree)
    assert found is not None
    return int(found)


def _same_relation(left: Relation, right: Relation, rules: TreeRules) -> bool:
    if left.sign != right.sign:
        return False
    sides = (left.left, left.right, right.left, right.right)
    if left.sign == "in" or not all(isinstance(side, Number) for side in sides):
        return _same(left.left, right.left, rules) and _same(left.right, right.right, rules)
    a, b, c, d = (side.tree for side in sides if isinstance(side, Number))
    return rules.proportional(("+", a, ("-", b)), ("+", c, ("-", d)), left.sign in ("<", "<="))


def _plainly_same(left: Tree, right: Tree) -> bool:
    if left == right:
        return True
    try:
        a, b = rational(left), rational(right)
    except TooLarge:
        return False
    if a is None or b is None:
        raise NeedsAlgebra
    return a == b


def _plainly_proportional(left: Tree, right: Tree, positive: bool) -> bool:
    if left == right:
        return True
    raise NeedsAlgebra


PLAIN = TreeRules(_plainly_same, _plainly_proportional)


def spelled(reading: Reading) -> str:
    """The answer in a form that its spellings share, as far as can be told without algebra."""
    if not reading.values:
        return reading.choice or reading.bare
    try:
        found = {_spelled(value) for value in reading.values}
    except (NeedsAlgebra, TooLarge):
        return reading.bare
    return found.pop() if len(found) == 1 else reading.bare


def _spelled(value: Value) -> str:
    match value:
        case Number(tree):
            found = rational(tree)
            if found is None:
                raise NeedsAlgebra
            return str(found)
        case Words(text):
            return text
        case Group(kind, items):
            parts = [_spelled(item) for item in items]
            return f"{kind} {', '.join(sorted(parts) if kind in UNORDERED else parts)}"
    raise NeedsAlgebra
