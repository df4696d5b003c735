"""One engine of each kind for all tests of this folder: `engine` is both in turn, `embedded` the embedded one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rollout_support import CONTEXT, EngineUnderTest, Kind, make_checkpoint

from recipe.config import resolve
from recipe.engines.launch import SglangServer, launch_embedded, launch_sglang
from recipe.engines.process import EngineProcess


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Where others want the cores too, threads that share the products of so small a model mostly wait for each
    other, and do so at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "first", seed=1)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "second", seed=2)


@pytest.fixture(scope="session")
def shared_embedded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    log = tmp_path_factory.mktemp("engine") / "log"
    launch = launch_embedded(
        checkpoint,
        weight_version="1",
        threads=1,
        context_length=CONTEXT,
        max_running_requests=48,
        returns_routed_experts=True,
    )
    with EngineProcess(launch, log) as process:
        process.wait_healthy(600)
        yield EngineUnderTest(process, checkpoint, Kind.EMBEDDED)


@pytest.fixture(scope="session")
def shared_sglang(
    sglang_python: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineUnderTest]:
    log = tmp_path_factory.mktemp("sglang") / "log"
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", str(sglang_python)]
    flags.append("--use-rollout-routing-replay")
    config = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags]).config
    launch = launch_sglang(
        checkpoint,
        SglangServer.of(config, gpus=()),
        weight_version="1",
        threads=1,
        context_length=CONTEXT,
        random_seed=7,
    )
    with EngineProcess(launch, log) as process:
        process.wait_healthy(900)
        yield EngineUnderTest(process, checkpoint, Kind.SGLANG)


@pytest.fixture(params=[Kind.EMBEDDED, pytest.param(Kind.SGLANG, marks=pytest.mark.sglang)])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineUnderTest]:
    """Each engine, as it was at the start when a test begins."""
    yield from _restored(request.getfixturevalue(f"shared_{request.param}"))


@pytest.fixture
def embedded(shared_embedded: EngineUnderTest) -> Iterator[EngineUnderTest]:
    """The embedded engine, for what SGLang does not promise."""
    yield from _restored(shared_embedded)


def _restored(engine: EngineUnderTest) -> Iterator[EngineUnderTest]:
    yield engine
    engine.post("/continue_generation")
    engine.post("/abort_request", {"abort_all": True})
    if engine.request("GET", "/model_info")[1]["weight_version"] != "1":
        engine.load(engine.checkpoint, "1")
