from collections.abc import Iterator
from pathlib import Path

import pytest
from evaluation_support import QUESTIONS, KnownServer, serving, write_questions

from recipe.weights.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "hf"
    write_tiny_checkpoint(folder, seed=1)
    return folder


@pytest.fixture
def server(checkpoint: Path) -> Iterator[KnownServer]:
    with serving(KnownServer(dict(QUESTIONS.values()), checkpoint)) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "aime-0000.jsonl")
