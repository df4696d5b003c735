"""The folder of a run's training checkpoints, and where a run begins: which one is the newest, which ones a run wrote.

    DIR/iter_0000010/                      one directory a checkpoint, renamed into place when it is whole
    DIR/latest_checkpointed_iteration.txt  the number of the newest (megatron's tracker)
    DIR/written.json                       the names of what this run wrote and has not deleted, the oldest first

Imports neither torch nor megatron: a command that only asks must not wait for them.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipe.config import Config
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text

LATEST = "latest_checkpointed_iteration.txt"
WRITTEN = "written.json"
METADATA = ".metadata"
"""torch_dist's own file, without which there are no tensors."""
PROGRESS = "progress.json"
"""The last file that a training checkpoint gets."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
"""What Hugging Face's weights lie in: shards with an index, or one file."""
_NAME = re.compile(r"iter_(\d+)")


def name_of(rollouts: int) -> str:
    """The directory of the checkpoint after so many rollouts."""
    return f"iter_{rollouts:07d}"


def is_training_checkpoint(directory: Path) -> bool:
    """Whether it is one checkpoint of a run, which training can go on from."""
    return (directory / PROGRESS).is_file()


def is_hugging_face(directory: Path) -> bool:
    """Whether the directory holds safetensors weights."""
    return (directory / INDEX).exists() or (directory / SINGLE).exists()


def holds_weights(directory: Path) -> bool:
    """Whether weights lie in the directory itself, torch_dist or safetensors."""
    return (directory / METADATA).is_file() or is_hugging_face(directory)


def latest(directory: Path) -> Path | None:
    """The newest whole training checkpoint under `directory`: the one that the tracker names or, where it names none
    that is there, the one with the highest number. None if there is none."""
    tracker = directory / LATEST
    said = tracker.read_text().strip() if tracker.is_file() else ""
    if said.isdecimal() and is_training_checkpoint(named := directory / name_of(int(said))):
        return named
    return max(_numbered(directory), key=_number, default=None)


def _numbered(directory: Path) -> Iterator[Path]:
    return (path for path in directory.glob("iter_*") if _NAME.fullmatch(path.name) and is_training_checkpoint(path))


def _number(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def others_that_are_whole(checkpoint: Path) -> list[Path]:
    """The training checkpoints beside this one, the newest first."""
    return sorted(set(_numbered(checkpoint.parent)) - {checkpoint}, key=_number, reverse=True)


def claim(checkpoint: Path, keep: int | None = None) -> None:
    """Takes the place of a checkpoint that is about to be written. What a run did not write gets another name there;
    what it wrote beyond the `keep` newest (None: all), as a save that removes nothing leaves it, goes before."""
    directory = checkpoint.parent
    written = _written(directory)
    if keep is not None:
        for name in [name for name in written if name != checkpoint.name][:-keep]:
            shutil.rmtree(directory / name, ignore_errors=True)
            written.remove(name)
    if checkpoint.exists() and checkpoint.name not in written:
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.kept-{time.strftime('%Y%m%d-%H%M%S')}"))
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write_text(directory / WRITTEN, json.dumps(list(dict.fromkeys([*written, checkpoint.name]))))


def note_written(checkpoint: Path, rollouts: int, keep: int | None, *, beside_others: bool = False) -> None:
    """Takes down that a run has written this checkpoint, which is the newest from now on. Of those that it wrote it
    keeps the `keep` newest (None: all) or, where it is `beside_others`, the `keep` oldest and this one; what it did not
    write stays."""
    directory = checkpoint.parent
    written = [*(name for name in _written(directory) if name != checkpoint.name), checkpoint.name]
    kept = written
    if keep is not None:
        kept = [*written[:-1][:keep], checkpoint.name] if beside_others else written[-keep:]
    atomic_write_text(directory / LATEST, f"{rollouts}\n")
    atomic_write_text(directory / WRITTEN, json.dumps(written))
    for name in [name for name in written if name not in kept]:
        shutil.rmtree(directory / name, ignore_errors=True)
    atomic_write_text(directory / WRITTEN, json.dumps(kept))


def _written(directory: Path) -> list[str]:
    """Names of this folder's run, as far as they are there."""
    path = directory / WRITTEN
    try:
        names = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        names = []  # damaged: nothing is deleted
    return [name for name in names if isinstance(name, str) and _NAME.fullmatch(name) and (directory / name).is_dir()]


def rollouts_in(checkpoint: Path) -> int:
    """Finished rollouts of a training checkpoint. Raises UserError, which names an older one, if it is damaged."""
    try:
        rollouts: object = json.loads((checkpoint / PROGRESS).read_text())["rollouts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(checkpoint / PROGRESS) from error
    if not isinstance(rollouts, int):
        raise damaged(checkpoint / PROGRESS)
    return rollouts


def damaged(file: Path) -> UserError:
    """That a file of a training checkpoint is missing, cut off or not what it should be."""
    others = others_that_are_whole(file.parent)
    cure = f"move it away, and --load goes on from {others[0].name}" if others else "restore it from a copy"
    return UserError(f"the checkpoint {file.parent} is damaged, its {file.name} cannot be read: {cure}")


@dataclass(frozen=True)
class StartPoint:
    """Where a run begins. Without checkpoint and weights: at `--ref-load` or `--hf-checkpoint`."""

    checkpoint: Path | None = None
    """The training checkpoint that it goes on from, with everything that was done before."""
    weights: Path | None = None
    """Weights that it starts from anew."""
    note: str | None = None
    """A sentence for the user."""


def find_start(config: Config) -> StartPoint:
    """What `--load` names: the newest checkpoint of a folder, one checkpoint, or weights. A run's own folder may be
    empty yet. Raises UserError if there is nothing to load, or if `--save` holds what this run would write over."""
    load, own = config.checkpoint.load, config.save_dir
    if load is None:
        _refuse_to_write_over(own)
        return StartPoint()
    if is_training_checkpoint(load):
        _refuse_to_write_over(own, but=load)
        return StartPoint(checkpoint=load)
    if (newest := latest(load)) is not None:
        _refuse_to_write_over(own, but=newest)
        return StartPoint(checkpoint=newest)
    if holds_weights(load):
        _refuse_to_write_over(own)
        return StartPoint(weights=load, note=f"{load} holds weights and no training checkpoint: the run starts anew")
    if load.resolve() == own.resolve() and (not load.exists() or load.is_dir()):
        return StartPoint(note=f"--load {load} holds no checkpoint yet: the run starts at its beginning")
    raise UserError(
        f"--load {load} {_what_it_is(load)}: name a folder of checkpoints, or leave --load out to start anew"
    )


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    return "holds neither checkpoints nor weights" if path.is_dir() else "is a file"


def _refuse_to_write_over(own: Path, but: Path | None = None) -> None:
    """Raises UserError if the folder holds checkpoints of another run, or of this one beyond the checkpoint that it is
    to go on from."""
    newest = latest(own)
    if newest is None or (but is not None and newest.resolve() == but.resolve()):
        return
    if but is not None and but.resolve().parent == own.resolve():
        raise UserError(
            f"{own} goes on beyond {but.name}, up to {newest.name}, and nothing of that is written over: to go back, "
            "give the run that starts there another --name (and --save, if you give one)"
        )
    raise UserError(
        f"{own} holds checkpoints of an earlier run: go on with --load {own}, or give another --save or --name"
    )
