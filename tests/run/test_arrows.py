"""Rooms of the house and the arrows between them: a room imports only from rooms below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    {"recipe.system"},
    {"recipe.config", "recipe.container", "recipe.download", "recipe.messages"},
    {"recipe.run"},
    {"recipe.data", "recipe.rewards", "recipe.grpo", "recipe.batching"},
    {"recipe.weights", "recipe.sampling"},
    {"recipe.generation"},
    {"recipe.plan", "recipe.rollout"},
    {"recipe.weight_sync"},
    {"recipe.engines", "recipe.megatron"},
    {"recipe.conversion", "recipe.cluster", "recipe.experience"},
    {"recipe.again", "recipe.assembly"},
    {"recipe.train"},
    {"recipe.mismatch", "recipe.smoke", "evaluation"},
)
"""From the ground up. What stands on one floor imports nothing of that floor."""


def room_of(module: str) -> str | None:
    """The room that a module of the product is in; None for others' modules."""
    package, *rest = module.split(".")
    if package == "evaluation":
        return package
    return f"recipe.{rest[0]}" if package == "recipe" and rest else None


def imported_by(source: str) -> Iterator[str]:
    """Modules that a program imports, also inside of functions, with every name as if it were a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def upward(module: str, source: str) -> list[str]:
    """Rooms that a module must not import from, and does."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(module)
    assert here in floors, f"{module} is in no room: put it into one, or give the new room a floor"
    others = {room for name in imported_by(source) if (room := room_of(name)) is not None and room != here}
    return sorted(room for room in others if floors[room] >= floors[here])


def modules() -> Iterator[Path]:
    for package in ("recipe", "evaluation"):
        yield from (path for path in (ROOT / package).rglob("*.py") if path != ROOT / package / "__init__.py")


def test_nothing_imports_upwards() -> None:
    found = {}
    for path in modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if rooms := upward(module, path.read_text()):
            found[module] = rooms
    assert found == {}


def test_an_arrow_upwards_is_found() -> None:
    hidden = "def late():\n    from recipe import cluster\n    import recipe.run.metrics\n"
    assert upward("recipe.rollout.client", hidden) == ["recipe.cluster"]
    assert upward("recipe.engines.launch", "from recipe.megatron.rank import TrainerRank") == ["recipe.megatron"]
    assert upward("recipe.assembly", "from evaluation.in_loop import evaluate") == ["evaluation"]
    assert upward("evaluation.aime", "import recipe.train\nfrom evaluation.scoring import score") == []


def test_the_hall_holds_the_loop_alone() -> None:
    hall = {path.stem for path in (ROOT / "recipe").glob("*.py")} - {"__init__"}
    assert hall == {"train", "experience", "messages"}
