"""What there is to download: repositories on the hub, and which of their files are needed."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase


class RepoType(StrEnum):
    MODEL = "model"
    DATASET = "dataset"


@dataclass(frozen=True)
class Source:
    """A repository, and what of it is needed. Files in its folders never are."""

    repo: str
    repo_type: RepoType
    wanted: tuple[str, ...]
    """Patterns of file names."""
    required: tuple[str, ...]
    """Patterns of which each has to match a file."""
    revision: str = "main"
    """What a first download takes, if not told otherwise."""

    def __str__(self) -> str:
        return f"{self.repo_type} {self.repo}"

    def wants(self, name: str) -> bool:
        """Whether the file is needed."""
        return "/" not in name and any(fnmatchcase(name, pattern) for pattern in self.wanted)

    def lacks(self, names: Iterable[str]) -> str | None:
        """The first required pattern that none of the names matches."""
        names = list(names)
        return next((pattern for pattern in self.required if not any(fnmatchcase(n, pattern) for n in names)), None)


GLM_4_7_FLASH = "zai-org/GLM-4.7-Flash"

FORMER_NAMES = {"THUDM/GLM-4.7-Flash": GLM_4_7_FLASH}
"""Repositories that moved to another organisation."""

_MODEL_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def model_source(repo: str = GLM_4_7_FLASH) -> Source:
    """A model's weights, configuration and tokenizer."""
    return Source(repo, RepoType.MODEL, _MODEL_FILES, required=("*.safetensors", "config.json"))


def data_source(repo: str, files: str = "*.jsonl") -> Source:
    """A data set's prompt files."""
    return Source(repo, RepoType.DATASET, (files,), required=(files,))


DATA_SETS = {
    "dapo-math-17k": data_source("zhuzilin/dapo-math-17k", "dapo-math-17k.jsonl"),
    "aime-2024": data_source("zhuzilin/aime-2024", "aime-2024.jsonl"),
}
