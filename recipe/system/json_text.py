"""JSON from outside: files and answers that may be anything. Whatever is wrong is one ValueError, or one sentence."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from recipe.system.errors import UserError

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """The value that a text says. Raises ValueError for what is no JSON: cut off, nested deeper than any real file, or
    with NaN, infinities or half a surrogate pair, which JSON has not. A byte order mark, Windows' way, is skipped."""
    try:
        data = text.encode() if isinstance(text, str) else text
        return from_json(data.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair") from error


def read_json(path: Path, shape: type[T], cure: str) -> T:
    """The content of a file, which has `shape`, a type that pydantic knows. Raises UserError, which ends with `cure`,
    if the file cannot be read or holds something else."""
    try:
        return TypeAdapter(shape).validate_python(parse_json(path.read_bytes()), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = f" at {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
        raise UserError(f"{path} is not what it should be{where} ({first['msg']}): {cure}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {cure}") from error
