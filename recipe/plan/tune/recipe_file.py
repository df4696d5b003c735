"""A recipe that extends another by what was tuned."""

import json
from pathlib import Path

from recipe.config.flags import SGLANG_KEY
from recipe.config.loading import find_recipe
from recipe.plan.hardware import Machine
from recipe.plan.tune.search import Choice
from recipe.plan.tune.space import Values
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text


def check_target(path: Path) -> None:
    """Raises UserError unless a new recipe can be written there."""
    if path.suffix != ".toml":
        raise UserError(f"--write {path}: a recipe's name ends in .toml")
    if path.exists():
        raise UserError(f"--write {path} is there already: name a new file")
    if not path.parent.is_dir():
        raise UserError(f"--write {path}: there is no folder {path.parent}")


def write_recipe(path: Path, base: str, choice: Choice, machine: Machine) -> None:
    """Writes the recipe, whole or not at all."""
    found = find_recipe(base, Path())
    extends = str(found) if base.endswith(".toml") else base
    nodes = choice.plan.resolved.config.cluster.actor_num_nodes
    head = f"# Tuned by the plan for {nodes} x {machine.gpus} {machine.gpu.name}; learning is as in its base."
    atomic_write_text(path, f"{head}\nextends = {json.dumps(extends)}\n{tables(choice.values, path.stem)}")


def tables(values: Values, name: str) -> str:
    """The settings as TOML's tables, with the recipe's name."""
    by_table: dict[str, list[str]] = {}
    for key, value in {**values, "misc.name": name}.items():
        table, _, field = key.rpartition(".")
        by_table.setdefault(table, []).append(f"{field} = {json.dumps(value)}")
    order = sorted(by_table, key=lambda table: (table.startswith(SGLANG_KEY), table == "misc"))
    return "".join(f"\n[{table}]\n" + "\n".join(by_table[table]) + "\n" for table in order)
