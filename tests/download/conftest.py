"""Downloads from a hub on the loopback interface, in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_contents import DATA, DATA_FILES, MODEL, MODEL_FILES, ROWS
from huggingface_hub import constants
from loopback_hub import LoopbackHub

from recipe.download import fetch
from recipe.download.__main__ import main

Run = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A hub with the model and a data set, which downloads in this process use, without a token and without waits."""
    with LoopbackHub() as hub:
        hub.commit(MODEL, MODEL_FILES)
        hub.commit(DATA, DATA_FILES)
        hub.commit("datasets/zhuzilin/dapo-math-17k", {"dapo-math-17k.jsonl": ROWS.encode() * 2})
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(fetch, "RETRY_WAITS_S", (0.0, 0.0, 0.0))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where to download to; it does not exist yet."""
    return tmp_path / "some" / "copy"


@pytest.fixture
def model(hub: LoopbackHub, directory: Path) -> Run:
    """Runs the command for the model with further flags."""
    return lambda *flags: main(["model", "--local-dir", str(directory), *flags])


@pytest.fixture
def data(hub: LoopbackHub, directory: Path) -> Run:
    """Runs the command for the data set with further flags."""
    return lambda *flags: main(["data", "aime-2024", "--local-dir", str(directory), *flags])
