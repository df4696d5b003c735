"""A shell in a container, on this terminal."""

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

from recipe.system.errors import UserError

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

CHUNK_BYTES = 1 << 16


def attach_terminal(client: "DockerClient", container: "Container") -> None:
    """Starts the container, whose process has a terminal, and connects it with this one until it ends. Raises UserError
    where there is no terminal."""
    if not sys.stdin.isatty():
        raise UserError("a shell needs a terminal; for a single command: invoke shell --command 'make test'")
    connection = client.api.attach_socket(str(container.id), {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
    channel = getattr(connection, "_sock", connection)  # docker wraps local sockets, and only those
    container.start()

    def resize(*_: object) -> None:
        columns, lines = shutil.get_terminal_size()
        container.resize(lines, columns)

    before = signal.signal(signal.SIGWINCH, resize)
    try:
        resize()
        with _raw(sys.stdin.fileno()):
            _copy(sys.stdin.fileno(), channel.fileno(), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGWINCH, before)
        connection.close()


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Every key goes to the container, Ctrl-C too."""
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _copy(keyboard: int, channel: int, screen: int) -> None:
    """Until the container's side closes."""
    sources = [keyboard, channel]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if channel in ready:
            answer = os.read(channel, CHUNK_BYTES)
            if not answer:
                return
            os.write(screen, answer)
        if keyboard in ready:
            typed = os.read(keyboard, CHUNK_BYTES)
            if typed:
                os.write(channel, typed)
            else:
                sources.remove(keyboard)
