"""Importing: functions of the user's own, named on the command line, and libraries that must not be interrupted."""

import importlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recipe.system.errors import UserError, is_unwinding

ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2}
"""Signals whose handlers end the program from wherever it is."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that end the program wait until the block is left: where one comes while torch is imported, its C++
    aborts the program instead."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
