"""What configuration groups are made of: the frozen base class, bounded types, a field's spelling as a flag."""

import ast
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from recipe.system.json_text import parse_json


class Group(BaseModel):
    """A frozen table of a recipe; the docstring under a field is its documentation and its `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Spelling:
    """How a field is written on the command line where `--field-with-dashes` (and `--no-...` for a switch) is not all.

    `name` replaces the derived flag, `also` adds flags that mean the same, `off` adds flags that turn a switch off.
    """

    name: str | None = None
    also: tuple[str, ...] = ()
    off: tuple[str, ...] = ()


Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number from 0 to 1."""

PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
"""A number above 0, at most 1."""

TopK = Annotated[int, Field(ge=-1), BeforeValidator(lambda k: _refuse_zero(k))]
"""How many most likely tokens to sample from; -1 is the whole vocabulary."""


def _refuse_zero(value: Any) -> Any:
    if value in (0, "0"):
        raise ValueError("0 tokens to sample from; -1 means the whole vocabulary")
    return value


def _read_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value or any(ord(character) < 32 for character in value):
        raise ValueError("a path is empty, or has control characters")
    return os.path.expanduser(os.path.expandvars(value))


Place = Annotated[Path, BeforeValidator(_read_path)]
"""A path; `~` and `$VARIABLES` are what a shell makes of them."""

Key = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]
"""The key of a field in a line of a prompt file."""

Cores = Annotated[float, Field(gt=0.0, le=4096.0)]
"""CPU cores of a process."""

Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
"""A sampling temperature."""


def _read_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f'no JSON object, such as {{"enable_thinking": false}} ({error})') from error


JsonObject = Annotated[dict[str, Any], BeforeValidator(_read_object)]
"""A table; on the command line a JSON object."""


class EvalPromptData(NamedTuple):
    """A named held-out prompt file."""

    name: Key
    path: Place


def _pair_up(value: Any) -> Any:
    """["aime", "/a.jsonl", "math", "/m.jsonl"] -> pairs; a list of pairs is left as it is."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    if len(value) % 2:
        raise ValueError(f"expected pairs of NAME PATH, got {len(value)} values")
    return list(zip(value[::2], value[1::2], strict=True))


EvalPromptDataPairs = Annotated[tuple[EvalPromptData, ...], BeforeValidator(_pair_up)]
"""Held-out prompt files; on the command line `NAME PATH [NAME PATH ...]`."""


class PromptData(NamedTuple):
    """A prompt file, and its share of the draws where there are several."""

    path: Place
    weight: float | None = None

    @property
    def name(self) -> str:
        """What its metrics are named by."""
        return self.path.stem

    def __str__(self) -> str:
        """As the command line has it."""
        return str(self.path) if self.weight is None else f"{self.path}:{self.weight}"


def _read_prompt_data(value: Any) -> Any:
    """A path or a list -> a list; "/a.jsonl:0.7" in it -> ("/a.jsonl", 0.7)."""
    match value:
        case str() | Path():
            return _read_prompt_data([value])
        case list() | tuple():
            return [_read_one(word) for word in value]
    return value


def _read_one(word: Any) -> Any:
    if isinstance(word, Path):
        return PromptData(word)
    return _path_and_weight(word) if isinstance(word, str) else word


def _path_and_weight(word: str) -> tuple[str, float | None]:
    # Paths may hold colons: a word that is a file is all path. Of any other, a number after the last colon is a weight.
    path, colon, weight = word.rpartition(":")
    if not colon or os.path.isfile(_read_path(word)):
        return word, None
    try:
        return path, float(weight)
    except ValueError:
        if os.path.isfile(_read_path(path)):
            raise ValueError(f"{weight!r} is no weight for {path}: write a number, as in {path}:0.7") from None
        return word, None


def _check_prompt_data(files: tuple[PromptData, ...]) -> tuple[PromptData, ...]:
    names = [file.name for file in files]
    if not files:
        raise ValueError("there is no file: name at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two files have the name {twice}, by which metrics tell them apart: rename or link one")
    without = [file.path for file in files if file.weight is None]
    if len(without) == len(files):
        return files
    if without:
        raise ValueError(f"{without[0]} has no weight, and others have: give every file one, or none")
    weights = [file.weight or 0.0 for file in files]
    if min(weights) <= 0:
        lowest = files[weights.index(min(weights))]
        raise ValueError(f"the weight of {lowest.path} is not above 0: give it a share of the draws, or leave it out")
    if abs((total := sum(weights)) - 1) > _WEIGHTS_WITHIN:
        raise ValueError(
            f"the weights add up to {total:.7g}, and shares of the draws add up to 1: change them, or give none, and "
            "each file counts by its number of prompts"
        )
    return files


_WEIGHTS_WITHIN = 1e-6


def _as_json(files: tuple[PromptData, ...]) -> list[list[str | float]]:
    return [[str(path)] if weight is None else [str(path), weight] for path, weight in files]


PromptDataFiles = Annotated[
    tuple[PromptData, ...],
    BeforeValidator(_read_prompt_data),
    AfterValidator(_check_prompt_data),
    PlainSerializer(_as_json, when_used="json"),
]
"""Prompt files; on the command line `PATH[:WEIGHT] [PATH[:WEIGHT] ...]`."""


_LONGEST_PATTERN = 10_000


def _parse_layer_pattern(value: Any) -> Any:
    """Megatron's forms of a layer pattern: 1, "1", [0, 1, 1] and "[0]*1+[1]*46" (lists, sums and repetitions only)."""
    if not isinstance(value, str):
        return value
    try:
        return _pattern_of(ast.parse(value.strip(), mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise _no_pattern(value) from error


def _check_layer_pattern(pattern: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(pattern, int) and pattern < 1:
        raise ValueError("every Nth layer holds experts, so N is at least 1")
    if isinstance(pattern, tuple) and not set(pattern) <= {0, 1}:
        raise ValueError("a layer is 0 (dense) or 1 (experts)")
    return pattern


def _no_pattern(text: str) -> ValueError:
    return ValueError(f"{text!r} is no layer pattern; write it like '[0]*1+[1]*46'")


def _pattern_of(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=elements) if all(isinstance(element, ast.Constant) for element in elements):
            return [element.value for element in elements]  # type: ignore[attr-defined]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _pattern_of(left), _pattern_of(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            items, times = _pattern_of(left), _pattern_of(right)
            if isinstance(items, list) and isinstance(times, int) and len(items) * times <= _LONGEST_PATTERN:
                return items * times
    raise _no_pattern(ast.unparse(node))


LayerPattern = Annotated[
    int | tuple[int, ...], BeforeValidator(_parse_layer_pattern), AfterValidator(_check_layer_pattern)
]
"""Which layers hold experts: N (every Nth layer) or one 0 or 1 a layer."""


def expand_layer_pattern(pattern: int | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """One 0 (dense) or 1 (experts) a layer, as megatron reads the pattern."""
    if isinstance(pattern, int):
        return tuple(int(layer % pattern == 0) for layer in range(num_layers))
    return pattern


_SGLANG_ALIASES = {
    "tp": "tp_size",
    "tensor_parallel_size": "tp_size",
    "dp": "dp_size",
    "data_parallel_size": "dp_size",
    "ep": "ep_size",
    "expert_parallel_size": "ep_size",
    "pp": "pp_size",
    "pipeline_parallel_size": "pp_size",
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "cuda_graph_bs": "cuda_graph_bs_decode",
}
"""SGLang's short names, and names it has changed since the specification was written (the last two)."""


def sglang_argument(name: str) -> str:
    """SGLang's own name of a server argument: underscores for dashes, its present name for short and former ones."""
    name = name.replace("-", "_")
    return _SGLANG_ALIASES.get(name, name)


SglangValue = bool | int | float | str | tuple[int | float | str, ...]
"""The value of an SGLang server argument; true is a bare flag, false leaves the argument out."""
