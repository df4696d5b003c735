"""What a download has to do: found out before anything is written."""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from recipe.download.hub import Hub, HubFile
from recipe.download.hub_repos import Source
from recipe.download.integrity import difference, in_threads, intact_files
from recipe.download.record import Record, read_record
from recipe.system.errors import UserError

WORK_NAME = ".download"
"""Folder in the directory for what is not finished; gone when everything is there."""


@dataclass(frozen=True)
class Plan:
    """How a directory becomes a source's copy."""

    source: Source
    directory: Path
    record: Record
    """As read; a new one before the first download."""
    files: tuple[HubFile, ...] = ()
    """All that are needed, as the hub describes them; not known where nothing is to be done."""
    missing: tuple[HubFile, ...] = ()
    """Those of them that have to be fetched."""

    @property
    def finished(self) -> bool:
        """Whether every file is there and as recorded."""
        return not self.files

    def partial(self, file: HubFile) -> Path:
        """Where the file is while it is fetched; of one content only, so that another is never appended to it."""
        return self.directory / WORK_NAME / f"{file.name}.{(file.sha256 or file.blob_id)[:12]}"

    def fetched(self, file: HubFile) -> int:
        """How many bytes of a missing file are there by now."""
        if (self.directory / file.name).exists():
            return file.bytes
        partial = self.partial(file)
        return min(partial.stat().st_size, file.bytes) if partial.exists() else 0

    @property
    def bytes_to_fetch(self) -> int:
        """What is still to come over the network."""
        return sum(file.bytes - self.fetched(file) for file in self.missing)


def make_plan(source: Source, directory: Path, revision: str | None, hub: Hub) -> Plan:
    """Compares the directory with its record and, unless that accounts for everything, with the hub.

    Raises UserError if the directory holds something else (another repository or commit, a file that has changed or
    was not downloaded), if the hub does not tell, or if the repository lacks a required file.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is no directory: choose another one for the {source}")
    record = read_record(directory, source)
    intact = frozenset[str]() if record is None else intact_files(directory, record)
    if record is not None and record.complete and intact == record.files.keys() and revision in (None, record.commit):
        _refuse_strays(source, directory, intact)
        return Plan(source, directory, record)
    asked = revision or (source.revision if record is None else record.commit)
    snapshot = hub.snapshot(source, asked)
    if record is None:
        record = Record(repo=source.repo, repo_type=source.repo_type, revision=asked, commit=snapshot.commit)
    if snapshot.commit != record.commit:
        raise UserError(
            f"{directory} holds commit {record.commit} of {source.repo}, but revision {asked} is commit "
            f"{snapshot.commit}: choose another directory for it, or remove this one"
        )
    files = tuple(file for file in snapshot.files if source.wants(file.name))
    lacking = source.lacks(file.name for file in files)
    if lacking is not None:
        raise UserError(f"the {source} has no file {lacking} at {asked} ({snapshot.commit}), which is needed")
    _refuse_strays(source, directory, {file.name for file in files})
    found = intact | _same_as_on_hub(source, directory, [file for file in files if file.name not in intact])
    return Plan(source, directory, record, files, tuple(file for file in files if file.name not in found))


def _refuse_strays(source: Source, directory: Path, names: Collection[str]) -> None:
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if source.wants(path.name) and path.name not in names:
            raise UserError(
                f"{path} is no file of the {source}, but would be taken for one: remove it, or choose another directory"
            )


def _same_as_on_hub(source: Source, directory: Path, files: Iterable[HubFile]) -> frozenset[str]:
    """The names of the files that are there without a record: left by an interrupted download or by another tool."""
    there = [file for file in files if (directory / file.name).exists()]

    def compare(file: HubFile) -> None:
        problem = difference(directory / file.name, file)
        if problem is not None:
            raise UserError(
                f"{directory / file.name} is not that of the {source} ({problem}): remove it, or choose another "
                "directory"
            )

    in_threads(compare, there)
    return frozenset(file.name for file in there)


def free_bytes(directory: Path) -> int:
    """Free space on the disk that the directory is or will be on."""
    return shutil.disk_usage(_existing(directory)).free


def check_space(plans: Iterable[Plan]) -> None:
    """Raises UserError if what the plans fetch does not fit on a disk."""
    disks = defaultdict[int, list[Plan]](list)
    for plan in plans:
        disks[_existing(plan.directory).stat().st_dev].append(plan)
    for sharing in disks.values():
        needed, free = sum(plan.bytes_to_fetch for plan in sharing), free_bytes(sharing[0].directory)
        if needed > free:
            directories = " and ".join(str(plan.directory) for plan in sharing)
            raise UserError(
                f"{needed:,} bytes are to be fetched into {directories}, but only {free:,} bytes are free there: "
                f"free {needed - free:,} bytes more, or choose another disk"
            )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
