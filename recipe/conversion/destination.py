"""Directories that a conversion or an export is about to write."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from recipe.system.errors import UserError


def check_destination(destination: Path, needed: int) -> None:
    """Makes the folder that `--save` lies in. Raises UserError if it exists or the disk lacks `needed` free bytes."""
    if destination.exists():
        raise UserError(f"{destination} exists already: remove it, or give another --save")
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if needed > free:
        raise UserError(
            f"{destination.parent} has {free / 1e9:.1f} GB free, but {destination.name} takes {needed / 1e9:.1f} GB: "
            "free some space, or give another --save"
        )


@contextmanager
def writing_errors_told(destination: Path) -> Iterator[None]:
    """Turns the failure of a write into a UserError."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        free = shutil.disk_usage(destination.parent).free
        raise UserError(
            f"{destination} cannot be written ({reason}; {free / 1e9:.1f} GB free there): free some space, or give "
            "another --save; nothing was left under that name"
        ) from error
