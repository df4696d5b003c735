"""One engine, one base and one image for all tests of the image."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_support import BASE, REQUIRED, Engine, cpu_subset, import_base, running_engine, torch_wheel, what_is_missing

TAG = "glm-flash-grpo:test"


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if reason := what_is_missing():
        if REQUIRED in os.environ:
            pytest.fail(f"{REQUIRED} is set, but {reason}")
        pytest.skip(reason)
    with running_engine(tmp_path_factory.mktemp("engine")) as engine:
        yield engine


@pytest.fixture(scope="session")
def lock(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hash-locked CPU subset of the image's lock; the base to install it on is there, too."""
    folder = tmp_path_factory.mktemp("base")
    import_base(engine, folder)
    lock = folder / "cpu-subset.lock"
    lock.write_text(cpu_subset(torch_wheel(folder)))
    return lock


@pytest.fixture(scope="session")
def image(engine: Engine, lock: Path) -> str:
    """The project's image on the stand-in base, built by the project's own task."""
    status, output = engine.invoke("image", "--tag", TAG, "--base-image", BASE, "--lock", lock)
    assert status == 0, output[-5000:]
    return TAG
