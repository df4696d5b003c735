"""TOML recipes and flags become one Config, and every value keeps where it came from."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from recipe.config.error_text import did_you_mean, listed, plainly, refuse
from recipe.config.fields import sglang_argument
from recipe.config.flags import SGLANG_KEY, CommandLine, spell
from recipe.config.schema import GROUPS, Config, fields
from recipe.system.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
FLAG_SOURCE = "flag"
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class Setting:
    """A value somebody set, and where: "flag" or "recipe FILE"."""

    value: object
    source: str


Settings = Mapping[str, Setting]
"""Settings by dotted key: `optimizer.lr`, `sglang.args.ep_size`."""


def shipped_recipes() -> list[str]:
    """The names `--recipe` and `extends` know."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_settings(command_line: CommandLine) -> dict[str, Setting]:
    """The recipe's settings, overridden by the flags. Raises UserError for an unreadable recipe or unknown key."""
    settings: dict[str, Setting] = {}
    if command_line.recipe is not None:
        settings |= _read_recipe(find_recipe(command_line.recipe, Path()), ())
    return settings | {key: Setting(value, FLAG_SOURCE) for key, value in command_line.values.items()}


def without_flags(command_line: CommandLine) -> dict[str, object]:
    """What the recipe has, or the default is, by the key of each field that a flag sets; None: neither."""
    of_recipe = read_settings(replace(command_line, values={}))
    defaults = {key: field.default for key, field in fields() if not field.is_required()}
    return {key: of_recipe[key].value if key in of_recipe else _plain(defaults.get(key)) for key in command_line.values}


def _plain(default: object) -> object:
    """A default as JSON has it."""
    if isinstance(default, str | int | float | bool | NoneType):
        return default
    return list(default) if isinstance(default, tuple) else None if default is PydanticUndefined else str(default)


def find_recipe(name: str, folder: Path) -> Path:
    """A shipped recipe by name, or a file (ending in .toml) relative to `folder`."""
    path = folder / name if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = shipped_recipes()
        raise UserError(
            f"there is no recipe {name}{did_you_mean(name, known)} "
            f"(a recipe is a file ending in .toml, or one of {listed(known)})"
        )
    return path.resolve()


def _read_recipe(path: Path, below: tuple[Path, ...]) -> dict[str, Setting]:
    """A recipe's settings on top of those it extends; `below` are the files that extend it."""
    if path in below:
        chain = " -> ".join(file.name for file in (*below, path))
        raise UserError(f"recipes extend one another in a circle: {chain}")
    base, tables = _parsed(path)
    settings = {} if base is None else _read_recipe(find_recipe(base, path.parent), (*below, path))
    return settings | _own_settings(tables, path)


def _parsed(path: Path) -> tuple[str | None, dict[str, Any]]:
    """What a recipe extends, and its tables."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error
    base = document.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"recipe {path}: extends must be the name of one recipe, not {base!r}")
    return base, document


def bases_of(recipe: str) -> list[str]:
    """The recipes that a readable one extends, the nearest first."""
    path, found = find_recipe(recipe, Path()), list[str]()
    while (base := _parsed(path)[0]) is not None:
        path = find_recipe(base, path.parent)
        found.append(str(path) if base.endswith(".toml") else base)
    return found


def _own_settings(document: dict[str, Any], path: Path) -> dict[str, Setting]:
    source = f"recipe {path.name if path.parent == RECIPES else path}"
    settings: dict[str, Setting] = {}
    for group, table in document.items():
        if group not in GROUPS:
            raise UserError(f"{source}: unknown table [{group}]{did_you_mean(group, GROUPS)}")
        if not isinstance(table, dict):
            raise UserError(f"{source}: {group} must be a table, not {table!r}")
        for name, value in table.items():
            key = f"{group}.{name}"
            if key == SGLANG_KEY:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {key} must be a table, not {value!r}")
                settings |= {f"{key}.{sglang_argument(argument)}": Setting(v, source) for argument, v in value.items()}
            elif name in GROUPS[group].model_fields:
                settings[key] = Setting(value, source)
            else:
                raise UserError(f"{source}: unknown key {name} in [{group}]{_where_it_belongs(group, name)}")
    return settings


def _where_it_belongs(group: str, name: str) -> str:
    others = [other for other, fields_of in GROUPS.items() if name in fields_of.model_fields]
    return f"; it belongs in [{others[0]}]" if others else did_you_mean(name, GROUPS[group].model_fields)


def build_config(settings: Settings) -> Config:
    """The typed Config of `settings`, without the arguments of SGLang's that are false: they are left out. Samples that
    may be stale are weighed (`use_tis`), where nobody says otherwise. Raises one UserError naming every wrong or
    missing value and where it was set."""
    tree: dict[str, Any] = {group: {} for group in GROUPS}
    for key, setting in settings.items():
        group, name, *argument = key.split(".", 2)
        if argument:
            if setting.value is not False:
                tree[group].setdefault(name, {})[argument[0]] = setting.value
        else:
            tree[group][name] = setting.value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        refuse(_explain(error.errors(), settings))
        raise
    given = "grpo.use_tis" in settings or config.grpo.custom_tis_function_path is not None
    if given or config.rollout.staleness == 0:
        return config
    return config.model_copy(update={"grpo": config.grpo.model_copy(update={"use_tis": True})})


def _explain(errors: list[ErrorDetails], settings: Settings) -> list[str]:
    """One sentence a field; what is missing together in one."""
    missing = [spell(_key(error)) for error in errors if error["type"] == "missing"]
    wrong = {_key(error): error for error in reversed(errors) if error["type"] != "missing"}
    problems = [_explain_value(key, error, settings) for key, error in reversed(wrong.items())]
    if missing:
        names = ", ".join(missing)
        problems.append(f"not set: {names}; give the flags, or --recipe {listed(shipped_recipes())}")
    return problems


def _key(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"][:2]))
    return f"{key}.{error['loc'][2]}" if key == SGLANG_KEY and len(error["loc"]) > 2 else key


def _explain_value(key: str, error: ErrorDetails, settings: Settings) -> str:
    setting = settings[key]
    what = spell(key, setting.value) if setting.source == FLAG_SOURCE else f"{key} = {setting.value!r}"
    return f"{what} ({setting.source}): {plainly(error['msg'])}"


def trace_sources(settings: Settings) -> dict[str, str]:
    """Where every field's value came from: "default", "recipe FILE" or "flag"."""
    sources = {key: DEFAULT_SOURCE for key, _ in fields() if key != SGLANG_KEY}
    return sources | {key: setting.source for key, setting in settings.items()}
