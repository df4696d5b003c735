"""What tests of every folder share: Hypothesis without a clock, an order for several workers, and real SGLang for those
that speak to it."""

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# What tests start is as from a terminal, also under nohup, whose children have the signal ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Nor are the variables of the `make test` that runs the tests those of a make that a test starts.
for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)

# Every core has a worker, or a run's process, of its own: threads beside it would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_WORKERS = 4
"""A run of two ranks and two engines takes some GB of memory."""
DEAREST = (
    "image",
    "end_to_end",
    "smoke",
    "rollout",
    "run",
    "watch",
    "evaluation",
    "cluster",
    "weights",
    "trainer",
    "config",
)
"""Folders whose tests take longest: they come first, so that no worker is left alone with one of them at the end."""
SHARE_SGLANG = (
    *("decode_speed", "engine_contract", "engine_control"),
    *("engine_process", "engine_weights", "in_flight_contract"),
)
"""Files of tests/rollout whose tests speak to one real SGLang, which takes more than a minute of a core to start."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one more than cores, as some tests wait for most of their time."""
    return min(len(os.sched_getaffinity(0)) + 1, MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling | None":
    """A file's tests go to one worker, and those of all files that share SGLang."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesOrSglang(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "SGLang" if Path(file).stem.removeprefix("test_") in SHARE_SGLANG else file

    return FilesOrSglang(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the tests, gives them the dearest folders first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: DEAREST.index(item.path.parent.name) if item.path.parent.name in DEAREST else 99)


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter of an environment with SGLang's CPU build; made first, if it is not there yet."""
    subprocess.run(["scripts/install.sh", ".venv-sglang", "sglang-cpu"], cwd=ROOT, check=True, timeout=600)
    return ROOT / ".venv-sglang" / "bin" / "python"
