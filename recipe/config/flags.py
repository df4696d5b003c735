"""The command line, generated from the schema: the only place that knows a flag.

Every field is a flag in megatron's and slime's spelling; `--sglang-X` is SGLang's server argument X. Flags are never
abbreviated, `--flag=value` works, a flag given twice counts as given last, and a value may start with one dash. A
switch that a recipe sets is unset by its `--no-` form, and an argument of SGLang's by `--sglang-X false`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType, NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from recipe.config.error_text import did_you_mean
from recipe.config.fields import Spelling, sglang_argument
from recipe.config.schema import fields
from recipe.system.errors import UserError

SGLANG_PREFIX = "--sglang-"
SGLANG_KEY = "sglang.args"
RECIPE_FLAG = "--recipe"
_TRUE, _FALSE, _NONE = "true", "false", "none"


class Arity(StrEnum):
    """How many values follow a flag."""

    SWITCH = "none"
    ONE = "one"
    MANY = "one or more"


@dataclass(frozen=True)
class Flag:
    """A flag and the dotted key of the field it sets; a switch sets `constant`."""

    text: str
    key: str
    arity: Arity
    constant: bool = True
    can_be_unset: bool = False
    """By the word `none`, where a recipe sets it and its default is nothing."""


@dataclass(frozen=True)
class CommandLine:
    """What a command line says: the recipe, and values by dotted key (still strings where they are not switches)."""

    recipe: str | None
    values: Mapping[str, object]


def all_flags() -> Iterator[Flag]:
    """Every flag of every field; the first flag of a key (and of a switch's state) is its usual one."""
    for key, field in fields():
        if key != SGLANG_KEY:
            yield from _flags_of(key, field)


def _flags_of(key: str, field: FieldInfo) -> Iterator[Flag]:
    spelling = next((item for item in field.metadata if isinstance(item, Spelling)), Spelling())
    dashed = key.partition(".")[2].replace("_", "-")
    arity = _arity(field.annotation)
    for text in (spelling.name or f"--{dashed}", *spelling.also):
        yield Flag(text, key, arity, can_be_unset=field.default in (None, ()) and not _names_none(field.annotation))
    if arity is Arity.SWITCH:
        opposite = dashed.removeprefix("no-") if dashed.startswith("no-") else f"no-{dashed}"
        for text in (f"--{opposite}", *spelling.off):
            yield Flag(text, key, arity, constant=False)


def _names_none(annotation: Any) -> bool:
    """Whether `none` is one of the words that a field takes."""
    return annotation == _NONE or any(map(_names_none, get_args(annotation)))


def _arity(annotation: Any) -> Arity:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    alternatives = [item for item in get_args(annotation) if item is not NoneType]
    if NoneType in get_args(annotation) and len(alternatives) == 1:
        return _arity(alternatives[0])
    if annotation is bool:
        return Arity.SWITCH
    return Arity.MANY if get_origin(annotation) is tuple else Arity.ONE


FLAGS: Mapping[str, Flag] = MappingProxyType({flag.text: flag for flag in all_flags()})


def spell(key: str, value: object = None) -> str:
    """A field as the command line says it: `--lr`, `--lr 0.1`, `--bf16`, `--no-bf16`, `--sglang-ep-size 8`."""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if key.startswith(f"{SGLANG_KEY}."):
        text = SGLANG_PREFIX + key.removeprefix(f"{SGLANG_KEY}.").replace("_", "-")
        if value is False:
            return f"{text} {_FALSE}"
        return text if value is None or value is True else f"{text} {value}"
    flags = [flag for flag in FLAGS.values() if flag.key == key]
    if value is None or flags[0].arity is not Arity.SWITCH:
        return flags[0].text if value is None else f"{flags[0].text} {value}"
    return next(flag.text for flag in flags if flag.constant == value)


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Reads the flags of `argv` (without the program's name). Raises UserError for whatever is no flag, with the
    nearest match, and for a wrong number of values."""
    recipe: str | None = None
    values: dict[str, object] = {}
    for text, words in _split(argv):
        if text == RECIPE_FLAG:
            recipe = _single(text, words)
        elif text.startswith(SGLANG_PREFIX):
            values[f"{SGLANG_KEY}.{sglang_argument(text.removeprefix(SGLANG_PREFIX))}"] = _sglang_value(words)
        elif text in FLAGS:
            flag = FLAGS[text]
            values[flag.key] = _value(flag, words)
        else:
            raise UserError(f"unknown flag {text}{did_you_mean(text, [*FLAGS, RECIPE_FLAG])}")
    return CommandLine(recipe, values)


def _split(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next one."""
    flag: tuple[str, list[str]] | None = None
    for word in argv:
        if word.startswith("--"):
            if flag is not None:
                yield flag
            text, equals, value = word.partition("=")
            flag = (text, [value] if equals else [])
        elif flag is not None:
            flag[1].append(word)
        else:
            raise UserError(f"unexpected argument {word!r}: everything is a flag, e.g. {RECIPE_FLAG} {word}")
    if flag is not None:
        yield flag


def _value(flag: Flag, words: list[str]) -> object:
    if flag.can_be_unset and words == [_NONE]:
        return () if flag.arity is Arity.MANY else None
    match flag.arity:
        case Arity.SWITCH:
            if words:
                raise UserError(f"{flag.text} takes no value, but is followed by {' '.join(words)!r}")
            return flag.constant
        case Arity.ONE:
            return _single(flag.text, words)
        case Arity.MANY:
            if not words:
                raise UserError(f"{flag.text} needs at least one value")
            return words


def _single(text: str, words: list[str]) -> str:
    if not words:
        raise UserError(f"{text} needs a value")
    if len(words) > 1:
        raise UserError(f"{text} takes one value, but is followed by {' '.join(words)!r}")
    return words[0]


def _sglang_value(words: list[str]) -> object:
    """A switch of SGLang's is given bare or with true, and left out with false: none of its arguments takes these words
    for a value."""
    if words in ([], [_TRUE]):
        return True
    if words == [_FALSE]:
        return False
    numbers = [_number(word) for word in words]
    return numbers[0] if len(numbers) == 1 else numbers


def _number(word: str) -> int | float | str:
    """A number where it prints as the very word, so that nothing changes on the way to SGLang."""
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if str(number) == word and number not in (float("inf"), float("-inf")) and number == number:
            return number
    return word
