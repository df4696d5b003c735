"""What tests of every folder share: Hypothesis without clock and chance, a folder for temporary files, an order for
several workers, and real SGLang for those that speak to it."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from recipe.system.scratch import COMPILED, TMPDIR, _user

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]

settings.register_profile(
    "repeats", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("repeats")

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


PRELOADED = (
    *("recipe.megatron.rank", "recipe.weights.tiny", "recipe.smoke.training", "recipe.smoke.weight_update"),
    *("torch._dynamo", "transformers.modeling_utils", "hypothesis", "pytest"),
)
"""What the processes that tests fork (multiprocessing's "forkserver") have from the start. All of a worker's come from
one process, which imports once what is set when the first is asked for: so it is the same for all tests."""
AFTER_MULTIPROCESSING = -200
"""Its own temporary folders go at -100."""


def pytest_configure(config: pytest.Config) -> None:
    """What tests, and what they start and kill, leave among the temporary files goes with them. pytest's own folders,
    and kernels, which are compiled once, stay where they would be."""
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    if hasattr(config, "workerinput"):
        return
    usual = tempfile.gettempdir()
    folder = os.path.realpath(tempfile.mkdtemp(prefix="t"))
    os.chmod(folder, 0o1777)  # as the usual one: some programs leave root behind
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    os.environ.setdefault(COMPILED, f"{usual}/torchinductor_{_user()}")
    os.environ[TMPDIR] = tempfile.tempdir = folder
    Finalize(None, remove_unless_mounted, (folder,), exitpriority=AFTER_MULTIPROCESSING)


def remove_unless_mounted(folder: str) -> None:
    """Removes it, unless something is mounted in it: mmdebstrap, if it is killed, leaves the machine's own /dev there,
    and a removal would go through to that."""
    mounted = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    if not any(place.startswith(f"{folder}/") for place in mounted):
        shutil.rmtree(folder, ignore_errors=True)


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


@pytest.fixture
def forked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes under measurement are forked, too: started anew, each takes seconds to import."""
    from recipe.smoke import together

    forked = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(together.multiprocessing, "get_context", lambda kind: forked)


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter of an environment with SGLang's CPU build; made first, if it is not there yet."""
    subprocess.run(["scripts/install.sh", ".venv-sglang", "sglang-cpu"], cwd=ROOT, check=True, timeout=3600)
    return ROOT / ".venv-sglang" / "bin" / "python"
