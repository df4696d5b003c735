"""Where a run writes, looked at before it starts: places that can be written, and nothing of anybody else's."""

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recipe.config import Config
from recipe.config.groups_training import ROLLOUT_ID
from recipe.run.journal import writing
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text


def check_outputs(config: Config) -> None:
    """Raises UserError if the run could not write its directory, its checkpoints or its exports, or if an export would
    replace what it did not write itself, or if there is no wandb for `--use-wandb`. Makes nothing."""
    _check_folder("--runs-dir and --name give", config.run_dir)
    _check_folder("--save", config.save_dir)
    if config.misc.use_wandb:
        from recipe.run.sinks import import_wandb

        import_wandb()
    template = config.checkpoint.save_hf
    if template is not None:
        exports = Exports(config.run_dir)
        _check_folder("--save-hf", Path(str(template).replace(ROLLOUT_ID, "0")).parent)
        for found in existing(template):
            exports.refuse_foreign(found)


def _check_folder(flag: str, folder: Path) -> None:
    """Raises UserError unless the folder, or the nearest one above it that exists, is one that can be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {folder}, but {there} is no folder: give another place")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"{flag} {folder}, but nothing can be written in {there} ({error.strerror}): give another place"
        ) from error


def existing(template: Path) -> Iterator[Path]:
    """What lies where exports go, at any number of rollouts."""
    before, placeholder, after = str(template).partition(ROLLOUT_ID)
    if not placeholder:
        yield from [template] if os.path.lexists(template) else []
        return
    numbered = re.compile(re.escape(before) + r"\d+" + re.escape(after).replace(re.escape(ROLLOUT_ID), r"\d+"))
    pattern = glob.escape(before) + "*" + glob.escape(after).replace(glob.escape(ROLLOUT_ID), "*")
    yield from (Path(name) for name in glob.iglob(pattern) if numbered.fullmatch(name))


class Exports:
    """Hugging Face directories that a run has written, or is about to: only these may it replace."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "exports.json"

    def claim(self, target: Path) -> None:
        """Takes `target` down as the run's own. Raises UserError if something of another origin lies there."""
        self.refuse_foreign(target)
        own = sorted({*self._own(), str(target.resolve())})
        with writing(self._path):
            atomic_write_text(self._path, json.dumps(own, indent=1) + "\n")

    def refuse_foreign(self, target: Path) -> None:
        """Raises UserError if something lies at `target` that this run did not write."""
        is_empty = target.is_dir() and not any(target.iterdir())
        if os.path.lexists(target) and not is_empty and str(target.resolve()) not in self._own():
            raise UserError(f"--save-hf {target} exists, and this run did not write it: give a new directory")

    def _own(self) -> list[str]:
        try:
            names: list[str] = json.loads(self._path.read_text()) if self._path.exists() else []
        except ValueError:
            return []  # damaged: nothing is the run's own
        return names
