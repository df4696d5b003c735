"""`--help`: every flag with the documentation of its field."""

from collections.abc import Iterator
from textwrap import fill
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from recipe.config.flags import FLAGS, RECIPE_FLAG, SGLANG_KEY, SGLANG_PREFIX, Arity
from recipe.config.loading import shipped_recipes
from recipe.config.schema import GROUPS

_WIDTH = 110

CHECK, FORCE, REPLAY_STEP = "--check", "--force", "--replay-step"
HELP = frozenset({"--help", "-h"})
"""Flags of the commands that train; all others are the configuration's."""


def help_text() -> str:
    """All flags by group, with what they mean and their defaults."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield f"{RECIPE_FLAG} NAME|FILE.toml"
    yield _indented(f"The recipe the flags override: {', '.join(shipped_recipes())}, or a file.")
    for group, table in GROUPS.items():
        yield f"\n[{group}]"
        for name, field in table.model_fields.items():
            key = f"{group}.{name}"
            yield f"{SGLANG_PREFIX}X [VALUE ...]" if key == SGLANG_KEY else _spellings(key, field)
            yield _indented(f"{field.description}{_default(field)}")


def _spellings(key: str, field: FieldInfo) -> str:
    flags = [flag for flag in FLAGS.values() if flag.key == key]
    placeholder = "|".join(_choices(field.annotation)) or "VALUE"
    value = {Arity.SWITCH: "", Arity.ONE: f" {placeholder}", Arity.MANY: " VALUE ..."}[flags[0].arity]
    return ", ".join(flag.text for flag in flags) + value


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, or of one that may be left out."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) if get_origin(part) is Literal for choice in get_args(part)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " Required."
    if field.default in (None, (), {}):
        return ""
    return f" Default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}."


def _indented(text: str) -> str:
    return fill(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")
