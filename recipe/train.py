"""Trains, by GRPO or on given responses: the command. The loop is in recipe/loop.py.

python -m recipe.train --recipe NAME [flags]            trains, if the run fits this machine (--force: in any case)
python -m recipe.train --recipe NAME [flags] --check    resolves and validates everything, starts nothing
"""

import asyncio
import sys

from recipe.config import help_text, resolve
from recipe.errors import run_main
from recipe.plan.preflight import preflight

CHECK, FORCE, HELP = "--check", "--force", "--help"


def main() -> None:
    arguments = sys.argv[1:]
    if HELP in arguments:
        print(help_text())
        return
    resolved = resolve([word for word in arguments if word not in (CHECK, FORCE)])
    if CHECK in arguments:
        print(resolved.describe())
        return
    for note in resolved.notes:
        print(f"note: {note}")
    preflight(resolved, force=FORCE in arguments)
    from recipe.loop import train  # what it imports takes seconds, which nobody waits for whose flags are wrong

    asyncio.run(train(resolved))


if __name__ == "__main__":
    run_main(main)
