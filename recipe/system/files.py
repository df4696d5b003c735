"""Files that matter are written beside their place and renamed, so that a crash never leaves half of one."""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Self

from recipe.system.errors import UserError


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` (fsync, then rename). Raises OSError and leaves the old file if it cannot."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode())


class FileLock:
    """A file that one process holds at a time; the kernel lets go of it with the process. Its directory is there."""

    def __init__(self, path: Path, refusal: str) -> None:
        """Takes the lock. Raises UserError with the sentence `refusal` if another has it."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(refusal) from error
        except OSError:
            # A file system without locks: nobody can be kept away.
            pass

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def sync(path: Path) -> None:
    """Returns when the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
