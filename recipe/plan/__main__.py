"""The plan of a run on machines that need not be at hand.

    python -m recipe.plan --recipe R [--gpu H100-80GB] [--host-memory 1TB] [--disk 2TB] [--price 2.5]
                          [--response-len 4096] [--response-spread 0.6] [--lengths-of RUN] [--json]
                          [any flag of the run]

Ends with 2 if the run cannot fit. `python -m recipe.plan --schema` explains the fields of --json.
"""

import argparse

from recipe.plan.colocated import colocated_twin
from recipe.plan.options import add_options, lengths_of, machine_of, read_without_weights
from recipe.plan.plan import make_plan
from recipe.plan.report import SCHEMA, as_json, comparison, page
from recipe.plan.suggest import suggestion
from recipe.plan.tune.search import Tuner
from recipe.plan.tune.table import hint
from recipe.system.errors import USER_ERROR_STATUS, run_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.plan",
        description="The plan of a run: memory, disk, time and money. All other flags are the run's.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of the page")
    parser.add_argument("--schema", action="store_true", help="what the fields of the JSON mean")
    return parser


def main() -> int:
    options, flags = _parser().parse_known_args()
    if options.schema:
        print("\n".join(f"{name}: {meaning}" for name, meaning in SCHEMA.items()))
        return 0
    settings, resolved = read_without_weights(flags)
    config = resolved.config
    machine, lengths = machine_of(options, config), lengths_of(options, config)
    plan = make_plan(resolved, machine, on_gpu=config.cluster.device != "cpu", lengths=lengths)
    changes = () if plan.fits else suggestion(plan)
    twin = colocated_twin(settings, resolved)
    colocated = None if twin is None or plan.time is None else make_plan(twin, machine, on_gpu=True, lengths=lengths)
    print(as_json(plan, changes, colocated) if options.json else page(plan, changes))
    if not options.json and colocated is not None:
        print(comparison(plan, colocated))
    if not options.json and plan.fits and plan.time is not None:
        tuner = Tuner(settings, resolved.architecture, machine, lengths)
        for line in hint(tuner.given(), tuner.quick()):
            print(line)
    return 0 if plan.fits else USER_ERROR_STATUS


if __name__ == "__main__":
    run_main(main)
