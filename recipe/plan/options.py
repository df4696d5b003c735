"""What `make plan` and `make tune` are asked for besides the run's own flags."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipe.config import Config, Resolved, resolve
from recipe.config.engine_placement import gpus_of_fullest_machine
from recipe.config.flags import parse_command_line
from recipe.config.loading import FLAG_SOURCE, Setting, Settings, read_settings
from recipe.plan import constants
from recipe.plan.hardware import DEFAULT_GPU, GPUS, Machine
from recipe.plan.lengths import Lengths, parse_lengths
from recipe.plan.node import machine_as_measured, read_rates

PUBLISHED = Path(__file__).parent / "published" / "GLM-4.7-Flash"
"""Holds the config.json of zai-org/GLM-4.7-Flash."""
CHECKPOINT_KEY = "model.hf_checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The machine, its price, and how long responses are."""
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"{', '.join(GPUS)}, or one with other memory: H100=94")
    parser.add_argument("--host-memory", default="1TB", help="of a machine (default: 1TB)")
    parser.add_argument("--disk", help="free where checkpoints go")
    parser.add_argument("--price", type=float, default=2.5, help="dollars a GPU and hour (default: 2.5)")
    parser.add_argument("--rates", type=Path, metavar="FILE", help="what this node was measured to reach")
    lengths = parser.add_argument_group("how long responses are")
    lengths.add_argument("--response-len", type=float, help="mean tokens (default: half of the longest)")
    lengths.add_argument(
        "--response-spread",
        type=float,
        default=constants.RESPONSE_SPREAD,
        help=f"standard deviation over the mean (default: {constants.RESPONSE_SPREAD:g})",
    )
    lengths.add_argument("--lengths-of", type=Path, metavar="RUN", help="those of this run directory's newest rollouts")


def machine_of(options: argparse.Namespace, config: Config) -> Machine:
    """The machines that are asked about. Raises UserError for words that mean nothing."""
    gpus = gpus_of_fullest_machine(config)
    machine = Machine.described(options.gpu, gpus, options.host_memory, options.disk, options.price)
    return machine if options.rates is None else machine_as_measured(machine, read_rates(options.rates))


def lengths_of(options: argparse.Namespace, config: Config) -> Lengths:
    """The responses that are asked about. Raises UserError where there can be none such."""
    longest = config.rollout.rollout_max_response_len
    return parse_lengths(
        options.response_len, options.response_spread, options.lengths_of, longest, constants.MEAN_RESPONSE
    )


def read_without_weights(flags: Sequence[str]) -> tuple[Settings, Resolved]:
    """The settings and the configuration of a run; where its model is not downloaded yet, with the config.json that it
    is published with."""
    settings: Settings = read_settings(parse_command_line(flags))
    setting = settings.get(CHECKPOINT_KEY)
    folder = None if setting is None else Path(str(setting.value))
    if folder is None or folder.name != PUBLISHED.name or (folder / "config.json").exists():
        return settings, resolve(flags)
    print(f"note: {folder} is not there yet: planned with GLM-4.7-Flash as published", file=sys.stderr)
    published = Setting(str(PUBLISHED), FLAG_SOURCE)
    return {**settings, CHECKPOINT_KEY: published}, resolve([*flags, "--hf-checkpoint", str(PUBLISHED)])


def resolve_without_weights(flags: Sequence[str]) -> Resolved:
    """The configuration alone."""
    return read_without_weights(flags)[1]
