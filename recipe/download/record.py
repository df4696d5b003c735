"""download.json: what a directory was filled with."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from recipe.download.hub_repos import RepoType, Source
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text

RECORD_NAME = "download.json"


class FileRecord(BaseModel):
    """A file as it was when it was downloaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str
    rows: int | None = None
    """For a data set: its lines that are not blank."""

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"{self.rows:,} rows, "
        return f"{rows}{self.bytes:,} bytes, SHA-256 {self.sha256}"


class Record(BaseModel):
    """The directory's repository and commit, from the moment when the first download begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    repo_type: RepoType
    revision: str
    """As it was asked for at the first download."""
    commit: str
    downloaded_at: str | None = None
    """When everything was there; None until then."""
    files: dict[str, FileRecord] = {}
    """Every file by name; empty until everything is there."""

    @property
    def complete(self) -> bool:
        """Whether everything has been there."""
        return self.downloaded_at is not None

    def write(self, directory: Path) -> None:
        """Writes download.json. Raises OSError and leaves the old one if it cannot."""
        atomic_write_text(directory / RECORD_NAME, self.model_dump_json(indent=1, exclude_none=True) + "\n")


def read_record(directory: Path, source: Source) -> Record | None:
    """The directory's record; None before its first download.

    Raises UserError if it cannot be understood, or is of another repository.
    """
    path = directory / RECORD_NAME
    if not path.exists():
        return None
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path} is damaged: restore it, or remove it to compare the files with the hub's") from error
    if (record.repo, record.repo_type) != (source.repo, source.repo_type):
        raise UserError(
            f"{directory} holds the {record.repo_type} {record.repo}: choose another directory for the {source}"
        )
    return record
