"""Importing: functions of the user's own, named on the command line, and libraries that must not be interrupted."""

import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recipe.system.errors import UserError, is_unwinding

ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2}
"""Signals whose handlers end the program from wherever it is."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that end the program wait until the block is left: where one comes while torch is imported, its C++
    aborts the program instead. Handlers wait, not the signals: one that this thread blocks is taken by another, Ray's
    for example, and Python runs its handler here all the same."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one in which handlers run
        before = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def load_function(flag: str, path: str) -> Callable[..., Any]:
    """The function that "module:function" names. Raises UserError, which names `flag`, if there is no such function."""
    module_name, _, function_name = path.partition(":")
    if not (module_name and function_name):
        raise UserError(f"{flag} {path} is not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if is_unwinding():
            raise
        raise UserError(f"{flag} {path}: the module cannot be imported ({error!r})") from error
    function: object = vars(module).get(function_name)
    if not callable(function):
        raise UserError(f"{flag} {path}: {module_name} has no function {function_name}")
    return function
