"""Functions of the user's own, named on the command line."""

import importlib
from collections.abc import Callable
from typing import Any

from recipe.system.errors import UserError, is_unwinding


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
