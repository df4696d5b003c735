"""The plan of a run on machines that need not be at hand.

    python -m recipe.plan --recipe R [--gpu H100-80GB] [--host-memory 1TB] [--disk 2TB] [--price 2.5]
                          [--response-len 4096] [--response-spread 0.6] [--lengths-of RUN] [--json]
                          [any flag of the run]

Ends with 2 if the run cannot fit. `python -m recipe.plan --schema` explains the fields of --json.
"""

import argparse
import sys
from pathlib import Path

from recipe.config import Resolved, resolve
from recipe.config.flags import parse_command_line
from recipe.config.loading import read_settings
from recipe.plan import constants
from recipe.plan.hardware import DEFAULT_GPU, GPUS, Machine
from recipe.plan.lengths import parse_lengths
from recipe.plan.plan import make_plan
from recipe.plan.report import SCHEMA, as_json, page
from recipe.plan.suggest import suggestion
from recipe.system.errors import USER_ERROR_STATUS, run_main

PUBLISHED = Path(__file__).parent / "published" / "GLM-4.7-Flash"
"""Holds the config.json of zai-org/GLM-4.7-Flash."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.plan",
        description="The plan of a run: memory, disk, time and money. All other flags are the run's.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"{', '.join(GPUS)}, or one with other memory: H100=94")
    parser.add_argument("--host-memory", default="1TB", help="of a machine (default: 1TB)")
    parser.add_argument("--disk", help="free where checkpoints go")
    parser.add_argument("--price", type=float, default=2.5, help="dollars a GPU and hour (default: 2.5)")
    lengths = parser.add_argument_group("how long responses are")
    lengths.add_argument("--response-len", type=float, help="mean tokens (default: half of the longest)")
    lengths.add_argument(
        "--response-spread",
        type=float,
        default=constants.RESPONSE_SPREAD,
        help=f"standard deviation over the mean (default: {constants.RESPONSE_SPREAD:g})",
    )
    lengths.add_argument(
        "--lengths-of", type=Path, metavar="RUN", help="as in the newest rollouts of this run directory"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of the page")
    parser.add_argument("--schema", action="store_true", help="what the fields of the JSON mean")
    return parser


def resolve_without_weights(flags: list[str]) -> Resolved:
    """The configuration. Where the model is not downloaded yet, with the config.json that it is published with."""
    command_line = parse_command_line(flags)
    setting = read_settings(command_line).get("model.hf_checkpoint")
    folder = None if setting is None else Path(str(setting.value))
    if folder is None or folder.name != PUBLISHED.name or (folder / "config.json").exists():
        return resolve(flags)
    print(f"note: {folder} is not there yet: planned with GLM-4.7-Flash as published", file=sys.stderr)
    return resolve([*flags, "--hf-checkpoint", str(PUBLISHED)])


def main() -> int:
    options, flags = _parser().parse_known_args()
    if options.schema:
        print("\n".join(f"{name}: {meaning}" for name, meaning in SCHEMA.items()))
        return 0
    resolved = resolve_without_weights(flags)
    cluster = resolved.config.cluster
    machine = Machine.described(
        options.gpu, cluster.actor_num_gpus_per_node, options.host_memory, options.disk, options.price
    )
    longest = resolved.config.rollout.rollout_max_response_len
    lengths = parse_lengths(
        options.response_len, options.response_spread, options.lengths_of, longest, constants.MEAN_RESPONSE
    )
    plan = make_plan(resolved, machine, on_gpu=cluster.device != "cpu", lengths=lengths)
    changes = () if plan.fits else suggestion(plan)
    print(as_json(plan, changes) if options.json else page(plan, changes))
    return 0 if plan.fits else USER_ERROR_STATUS


if __name__ == "__main__":
    run_main(main)
