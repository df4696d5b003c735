"""One embedded engine for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_support import CONTEXT, EngineUnderTest, make_checkpoint

from recipe.rollout.servers.launch import launch_embedded
from recipe.rollout.servers.process import EngineProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "first", seed=1)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "second", seed=2)


@pytest.fixture(scope="session")
def shared_engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    log = tmp_path_factory.mktemp("engine") / "log"
    launch = launch_embedded(checkpoint, weight_version="1", threads=1, context_length=CONTEXT, max_running_requests=48)
    with EngineProcess(launch, log) as process:
        process.wait_healthy(120)
        yield EngineUnderTest(process, checkpoint)


@pytest.fixture
def engine(shared_engine: EngineUnderTest) -> Iterator[EngineUnderTest]:
    """The engine, as it was at the start when a test begins."""
    yield shared_engine
    shared_engine.post("/continue_generation")
    shared_engine.post("/abort_request", {"abort_all": True})
    if shared_engine.request("GET", "/model_info")[1]["weight_version"] != "1":
        body = {"model_path": str(shared_engine.checkpoint), "weight_version": "1"}
        shared_engine.post("/update_weights_from_disk", body)
