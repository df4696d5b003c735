"""Checkpoint folders of GLM-4.7-Flash's shape, and command lines over them."""

import json
from pathlib import Path
from typing import Any

import pytest
from config_support import GLM_4_7_FLASH, Refusal, Try, WriteCheckpoint

from recipe.config import Resolved, resolve, sglang_rules
from recipe.system.errors import UserError


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether SGLang is installed or not; its parser has tests of its own."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Writes config.json with changes; None drops a key."""

    def write(**changes: Any) -> Path:
        folder = tmp_path / "GLM-4.7-Flash"
        folder.mkdir(exist_ok=True)
        document = {key: value for key, value in (GLM_4_7_FLASH | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(document))
        return folder

    return write


@pytest.fixture
def checkpoint(write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint()


@pytest.fixture
def resolve_8gpu(checkpoint: Path) -> Try:
    """Resolves the 8-GPU recipe with more flags."""

    def attempt(*flags: str) -> Resolved:
        return resolve(["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(checkpoint), *flags])

    return attempt


@pytest.fixture
def resolve_tiny(checkpoint: Path) -> Try:
    """Resolves the tiny recipe (one CPU rank, embedded engine) with more flags."""

    def attempt(*flags: str) -> Resolved:
        return resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags])

    return attempt


@pytest.fixture
def refusal(resolve_8gpu: Try) -> Refusal:
    """The sentence that the 8-GPU recipe with more flags is refused with."""

    def refused(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            resolve_8gpu(*flags)
        return str(error.value)

    return refused
