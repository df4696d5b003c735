"""A file of JSON lines that survives crashes and full disks: it holds whole lines only, and can be cut back."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipe.system.errors import DISK_IS_FULL, UserError
from recipe.system.files import atomic_write_bytes
from recipe.system.json_text import parse_json


class Journal:
    """Appends are on the disk when they return."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, or nothing at all. Raises UserError where the disk is full or the file cannot be written."""
        rest = memoryview(encode(record))
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that a crash left unfinished is not one. Raises UserError if a line is damaged."""
        return [record for _, record in self._whole_lines()]

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Removes the records that are not `wanted`; the others stay as they are, byte for byte."""
        if self._path.exists():
            kept = b"".join(line for line, record in self._whole_lines() if wanted(record))
            with writing(self._path):
                atomic_write_bytes(self._path, kept)

    def _whole_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        for number, line in enumerate(lines, 1):
            try:
                yield line, parse_json(line)
            except ValueError as error:
                raise UserError(f"{self._path} is damaged in line {number}; restore the file or remove it") from error


class LineReader:
    """Reads a journal that another process writes, a part at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = (0, 0, 0)
        self._read = self._lines = 0

    def new_lines(self, limit: int | None = None) -> tuple[list[dict[str, Any]], bool]:
        """The records since the last call, of `limit` bytes at most, and whether they are the journal's first ones: at
        first, and where it was cut back meanwhile, which makes a new file of it. Raises UserError for a damaged
        line."""
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                head = file.readline()
                found = (state.st_dev, state.st_ino, hash(head) if head.endswith(b"\n") else 0)
                anew = found != self._file or state.st_size < self._read
                file.seek(0 if anew else self._read)
                data = file.read(limit or -1)
        except FileNotFoundError:
            found, data, anew = (0, 0, 0), b"", self._read > 0
        if anew:
            self._file, self._read, self._lines = found, 0, 0
        whole = data[: data.rfind(b"\n") + 1]
        records = [self._parsed(number, line) for number, line in enumerate(whole.splitlines(), self._lines + 1)]
        self._read, self._lines = self._read + len(whole), self._lines + len(records)
        return records, anew

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record: dict[str, Any] = parse_json(line)
            return record
        except ValueError as error:
            raise UserError(f"{self._path} is damaged in line {number}") from error


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as a line of a journal."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise UserError(f"the disk is full: {path} could not be written; free space there and go on") from error
        raise UserError(f"{path} could not be written: {error.strerror}") from error
