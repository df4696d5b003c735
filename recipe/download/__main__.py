"""The command; `recipe.download` says how it is used."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recipe.download.display import say, show_plan, show_result
from recipe.download.fetch import fetch
from recipe.download.hub import Hub
from recipe.download.hub_repos import DATA_SETS, FORMER_NAMES, GLM_4_7_FLASH, Source, data_source, model_source
from recipe.download.plan import check_space, make_plan
from recipe.system.errors import UserError, run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises UserError, or SystemExit for arguments that argparse refuses."""
    options = _parser().parse_args(arguments)
    console = Console()
    hub = Hub()
    plans = []
    for source, directory in _copies(options, console):
        if directory.exists():
            say(console, f"checking what is in {directory}")
        began = time.monotonic()
        try:
            plan = make_plan(source, directory, options.revision, hub)
        except OSError as error:
            raise UserError(f"{directory} cannot be read: {error}") from error
        show_plan(plan, time.monotonic() - began, console)
        plans.append(plan)
    check_space(plans)
    if options.dry_run:
        say(console, "dry run: nothing was fetched or written")
        return
    for plan in plans:
        if not plan.finished:
            show_result(plan, fetch(plan, hub, console), console)


def _copies(options: argparse.Namespace, console: Console) -> list[tuple[Source, Path]]:
    match options.what:
        case "all":
            copies = {"GLM-4.7-Flash": model_source()} | DATA_SETS
            return [(source, options.base_dir / name) for name, source in copies.items()]
        case "data":
            return [(DATA_SETS[options.name] if options.name else data_source(options.repo), options.local_dir)]
    repo = FORMER_NAMES.get(options.repo, options.repo)
    if repo != options.repo:
        say(console, f"note: {options.repo} is the former name of {repo}")
    return [(model_source(repo), options.local_dir)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.download",
        description="Downloads model and data sets from the Hugging Face hub: pinned to a commit, resumable, verified.",
        epilog="HF_ENDPOINT names another hub. A token is only taken from HF_TOKEN, or from where `hf auth login` "
        "stored it.",
    )
    commands = parser.add_subparsers(dest="what", required=True)
    model = commands.add_parser("model", help="weights, configuration and tokenizer of a model")
    model.add_argument("--repo", default=GLM_4_7_FLASH, help="default: %(default)s")
    data = commands.add_parser("data", help="a data set's prompt files")
    which = data.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", choices=DATA_SETS)
    which.add_argument("--repo", help="another data set: all its jsonl files, with the fields prompt and label")
    every = commands.add_parser("all", help=f"{GLM_4_7_FLASH} and {' and '.join(DATA_SETS)}")
    every.add_argument("--base-dir", type=Path, required=True, help="gets a directory for each of them")
    every.set_defaults(revision=None)
    for command in (model, data):
        command.add_argument("--local-dir", type=Path, required=True, help="gets the files and download.json")
        command.add_argument("--revision", help="branch, tag or commit; default: the one recorded there, or main")
    for command in (model, data, every):
        command.add_argument("--dry-run", action="store_true", help="show what would be done, and end")
    return parser


if __name__ == "__main__":
    run_main(main)
