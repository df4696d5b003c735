"""What an answer or a label was read as."""

from dataclasses import dataclass

from recipe.rewards.expressions import Tree
from recipe.rewards.words import NO_UNIT, Unit


@dataclass(frozen=True)
class Number:
    """A number, or an expression with variables."""

    tree: Tree
    unit: Unit = NO_UNIT


@dataclass(frozen=True)
class Words:
    """Words and nothing else, without case: "no solution"."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several values in an order, unless the kind is one of UNORDERED."""

    kind: str
    """Brackets (`()`, `[)`, ...: a tuple, a point or an interval), LIST, UNION, RECORD, STATEMENTS, MODULAR (a residue
    and its modulus), `:` (times and ratios), `matrix RxC`."""
    items: tuple["Value", ...]


@dataclass(frozen=True)
class Relation:
    """Two expressions and `=`, `!=`, `<`, `<=` or `in` between them."""

    sign: str
    left: "Value"
    right: "Value"


Value = Number | Words | Group | Relation

LIST, UNION, RECORD, STATEMENTS, MODULAR = "list", "union", "record", "statements", "mod"
UNORDERED = frozenset({LIST, UNION, RECORD, STATEMENTS})


@dataclass(frozen=True)
class Reading:
    """What an answer or a label says."""

    bare: str
    """The text without ornaments."""
    values: tuple[Value, ...] = ()
    """One, or those of the sides of an equation, which must be equal; none if the text cannot be read."""
    name: str = ""
    """What the value is said to be the value of: `f(3)`."""
    choice: str = ""
    """The letter of a multiple choice."""
    problem: str = ""
    """Why it cannot be read, as the end of a sentence; empty if it can."""
