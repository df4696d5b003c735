"""Whether files are what they should be."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from recipe.download.hub import HubFile
from recipe.download.record import FileRecord, Record
from recipe.system.errors import UserError
from recipe.system.files import sha256_file
from recipe.system.json_text import parse_json

DATA_FIELDS = ("prompt", "label")
_THREADS = 8

T = TypeVar("T")
R = TypeVar("R")


def difference(path: Path, file: HubFile) -> str | None:
    """What tells the file at `path` from the hub's; None if they are the same."""
    found = path.stat().st_size
    if found != file.bytes:
        return f"the hub says {file.bytes:,} bytes, found {found:,}"
    kind, expected = ("git SHA-1", file.blob_id) if file.sha256 is None else ("SHA-256", file.sha256)
    digest = _git_blob_id(path) if file.sha256 is None else sha256_file(path)
    return None if digest == expected else f"the hub says {kind} {expected}, found {digest}"


def intact_files(directory: Path, record: Record) -> frozenset[str]:
    """The names of the recorded files that are there. Raises UserError for one that has changed since."""
    there = {name: file for name, file in record.files.items() if (directory / name).is_file()}

    def changed(name: str) -> UserError:
        path, file = directory / name, there[name]
        return UserError(
            f"{path} has changed since its download: recorded are {file}; found are {_measure(path, file)}; remove it "
            f"and run the same command to fetch it again, from commit {record.commit[:12]}"
        )

    def compare_hash(name: str) -> None:
        if sha256_file(directory / name) != there[name].sha256:
            raise changed(name)

    for name, file in there.items():
        if (directory / name).stat().st_size != file.bytes:
            raise changed(name)
    in_threads(compare_hash, there)
    return frozenset(there)


def _measure(path: Path, like: FileRecord) -> FileRecord:
    rows = None
    if like.rows is not None:
        with path.open("rb") as lines:
            rows = sum(1 for line in lines if line.strip())
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path), rows=rows)


def count_rows(path: Path) -> int:
    """The number of lines of a data set's file, blank ones not counted.

    Raises UserError, which names file and line, for one that is not a JSON object with DATA_FIELDS; also if there is
    none.
    """
    rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows += 1
                problem = _row_problem(line)
                if problem is not None:
                    raise UserError(f"{path}, line {number}: {problem}")
    if rows == 0:
        raise UserError(f"{path} holds no rows")
    return rows


def _row_problem(line: bytes) -> str | None:
    try:
        row = parse_json(line)
    except ValueError as error:
        return f"not valid JSON ({error})"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = next((field for field in DATA_FIELDS if field not in row), None)
    return None if missing is None else f"there is no field {missing!r} among {', '.join(map(repr, row))}"


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results in order, computed side by side: hashing does not hold Python's lock. The first exception ends it."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
