"""A folder for what a program makes beside its results: closed to other users, and gone with it.

Temporary files of the program and of all that it starts lie there (TMPDIR), and Ray's sockets and logs. Where the
program is killed, `recipe.system.reaper` removes it, and what even that leaves behind the next program's start.
"""

import fcntl
import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipe.system.errors import UserError

PREFIX = "recipe-"
MARK = ".scratch"
"""A file in such a folder: others may have names like it."""
TMPDIR, COMPILED = "TMPDIR", "TORCHINDUCTOR_CACHE_DIR"
USUAL = Path("/tmp")
LONGEST_SOCKET = 107
"""Bytes of a socket's path (unix(7))."""
LONGEST_RAY_SOCKET = f"{PREFIX}12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Below the folder for temporary files."""
JUST_MADE_S = 10.0
"""A folder that was changed within this time may be one that its program has not locked yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """The folder, of mode 700, until the block is left; meanwhile temporary files of this process and its children go
    there. Raises UserError where there is no place for it."""
    place = _place()
    _remove_abandoned(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        (folder / MARK).touch()
        with _temporary_files_in(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _place() -> Path:
    """Where the system's temporary files go, or /tmp if sockets there had too long a name."""
    given = Path(tempfile.gettempdir())
    for place in (given, USUAL):
        if len(os.fsencode(place / LONGEST_RAY_SOCKET)) <= LONGEST_SOCKET and os.access(place, os.W_OK | os.X_OK):
            return place
    raise UserError(
        f"the folder for temporary files, {given}, has too long a name for sockets, and {USUAL} cannot be written: set "
        f"{TMPDIR} to a folder of at most {LONGEST_SOCKET - len(LONGEST_RAY_SOCKET) - 1} characters"
    )


def _remove_abandoned(place: Path) -> None:
    """Those of this user whose program is gone: nobody locks them."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            is_ours = folder.stat().st_uid == os.getuid() and (folder / MARK).exists()
            if not is_ours or time.time() - folder.stat().st_mtime < JUST_MADE_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _user() -> str:
    """By name, as torch has it, or by number in a container that does not know the name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """torch's compiled kernels stay where they were: others use them, too."""
    before = {name: os.environ.get(name) for name in (TMPDIR, COMPILED)}
    given = tempfile.tempdir
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    os.environ |= {TMPDIR: str(folder), COMPILED: before[COMPILED] or str(compiled)}
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = given
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
