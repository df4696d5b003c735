"""Mistakes a user can mend are told in one sentence and end the program with a non-zero status."""

import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2


class UserError(Exception):
    """One clear sentence for the user: what is wrong, where, and what to do."""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status; a UserError is printed without a traceback."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
