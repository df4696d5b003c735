"""The cheapest settings of speed for a run, by the plan; those of learning stay.

    python -m recipe.plan.tune --recipe R [--best 3] [--write FILE.toml] [--gpu H100-80GB] [--host-memory 1TB]
                               [--disk 2TB] [--price 2.5] [--response-len 4096] [--response-spread 0.6]
                               [--lengths-of RUN] [any flag of the run]

--write makes a recipe of the cheapest that extends the given one. Ends with 2 if nothing that was tried fits.
"""

import argparse
from pathlib import Path

from recipe.config.flags import parse_command_line
from recipe.plan.options import add_options, lengths_of, machine_of, read_without_weights
from recipe.plan.tune.recipe_file import check_target, write_recipe
from recipe.plan.tune.search import Tuner
from recipe.plan.tune.table import table
from recipe.system.errors import USER_ERROR_STATUS, UserError, run_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.plan.tune",
        description="Settings of speed with which a run costs least; learning stays. All other flags are the run's.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--best", type=int, default=3, help="how many to show (default: 3)")
    parser.add_argument("--write", type=Path, metavar="FILE.toml", help="a recipe with the cheapest, which is new")
    return parser


def main() -> int:
    options, flags = _parser().parse_known_args()
    command_line = parse_command_line(flags)
    if options.write is not None:
        if command_line.recipe is None:
            raise UserError("--write makes a recipe that extends the given one: name it with --recipe")
        check_target(options.write)
    settings, resolved = read_without_weights(flags)
    machine, lengths = machine_of(options, resolved.config), lengths_of(options, resolved.config)
    tuner = Tuner(settings, resolved.architecture, machine, lengths)
    given, best = tuner.given(), tuner.best(options.best)
    print(table(given, best))
    if not best:
        return USER_ERROR_STATUS
    if options.write is not None:
        assert command_line.recipe is not None
        write_recipe(options.write, command_line.recipe, best[0], machine)
        print(f"\nwrote {options.write}: train with --recipe {options.write}")
    return 0


if __name__ == "__main__":
    run_main(main)
