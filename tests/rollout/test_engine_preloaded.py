"""SGLang's processes have imported when they are asked for, and are what multiprocessing would have spawned.

A package of SGLang's name stands for it: what it does is what SGLang does of multiprocessing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest

from recipe.engines.launch import SERVE

SET_BY_SGLANG = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "CUTE_DSL_LOG_LEVEL": "30",
    "CUTE_DSL_LOG_TO_CONSOLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "SGLANG_DISABLE_OUTLINES_DISK_CACHE": "0",
    "SGLANG_ENABLE_DETERMINISTIC_INFERENCE": "0",
    "SGLANG_ENABLE_TORCH_COMPILE": "0",
    "SGLANG_RUN_ID": "run 5",
    "SGLANG_USE_CUDA_IPC_TRANSPORT": "1",
    "TRTLLM_ENABLE_PDL": "1",
}
"""Before it starts a process, by SGLang 0.5.21 on a GPU."""
SERVER = """
import json, multiprocessing, os, psutil
from sglang.srt.managers.data_parallel_controller import control, schedule
from sglang.srt.managers.detokenizer_manager import detokenize
from sglang.told import tell

def run_server(arguments):
    multiprocessing.set_start_method("spawn", force=True)
    os.environ.update(json.loads(os.environ["SET_LATE"]))
    tell("server")
    ours, theirs = multiprocessing.Pipe(duplex=False)
    first = control if "--dp-size" in arguments else schedule
    process = multiprocessing.Process(target=first, args=(0, theirs))
    library = os.environ.get("LIBRARY")
    if library:
        os.environ["LD_PRELOAD"] = library
    process.start()
    if library:
        del os.environ["LD_PRELOAD"]
    processes = [process]
    if "--node-rank" not in arguments:
        processes.append(multiprocessing.Process(target=detokenize))
        processes[-1].start()
    assert ours.recv() in ("scheduled 0", "scheduled 1")
    for process in processes:
        process.join()
    tell("ends", codes=[process.exitcode for process in processes], children=len(psutil.Process().children()))
"""
CONTROLLER = """
import multiprocessing, sys, sglang.imported
from sglang.told import tell

def control(number, pipe):
    tell("controller")
    processes = [multiprocessing.Process(target=schedule, args=(rank, pipe)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode for process in processes))

def schedule(number, pipe):
    tell("scheduler", number=number)
    pipe.send(f"scheduled {number}")
    sys.exit(7)
"""
FILES = {
    "__init__.py": "",
    "imported.py": """
import os, time
BY, BEFORE = os.getpid(), "SGLANG_RUN_ID" not in os.environ
with open(os.environ["TOLD"] + ".importing", "a") as file:
    file.write(f"{BY}\\n")
time.sleep(float(os.environ["IMPORT_S"]))
""",
    "told.py": """
import json, os
from sglang import imported

def tell(name, **others):
    environment = {key: os.environ.get(key) for key in ("LD_PRELOAD", "SGLANG_RUN_ID", "OTHER")}
    own = {"name": name, "pid": os.getpid(), "parent": os.getppid(), "environment": environment}
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(own | {"imported_by": imported.BY, "imported_before": imported.BEFORE} | others) + "\\n")
""",
    "launch_server.py": SERVER,
    "srt/__init__.py": "",
    "srt/plugins.py": "def load_plugins(): pass",
    "srt/server_args.py": "def prepare_server_args(arguments): return arguments",
    "srt/utils.py": "def kill_process_tree(*arguments, **named): pass",
    "srt/managers/__init__.py": "",
    "srt/managers/data_parallel_controller.py": CONTROLLER,
    "srt/managers/detokenizer_manager.py": """
import sys
from sglang.told import tell

def detokenize():
    tell("detokenizer")
    sys.exit(5)
""",
    "srt/models/__init__.py": "",
    "srt/models/registry.py": "",
}


@dataclass
class FakeSglang:
    """A folder that holds the package, and what its processes tell."""

    folder: Path

    def start(
        self, *arguments: str, late: Mapping[str, str] = MappingProxyType({}), import_s: float = 0.0, **environment: str
    ) -> "subprocess.Popen[str]":
        """`late`: what the server sets besides before it starts a process."""
        given = {
            "PYTHONPATH": str(self.folder),
            "TOLD": str(self.folder / "told"),
            "SET_LATE": json.dumps(SET_BY_SGLANG | dict(late)),
            "IMPORT_S": str(import_s),
        }
        command = [sys.executable, str(SERVE), *arguments]
        return subprocess.Popen(
            command, env=os.environ | given | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, late: Mapping[str, str] = MappingProxyType({}), **environment: str) -> str:
        """What the server printed."""
        process = self.start(*arguments, late=late, **environment)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return said

    def told(self) -> dict[str, dict[str, Any]]:
        lines = map(json.loads, (self.folder / "told").read_text().splitlines())
        return {f"{line['name']}{line.get('number', '')}": line for line in lines}


@pytest.fixture
def sglang(tmp_path: Path) -> FakeSglang:
    for name, text in FILES.items():
        (tmp_path / "sglang" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    return FakeSglang(tmp_path)


def imported_before(told: dict[str, dict[str, Any]], name: str) -> bool:
    """Whether a process had imported before it was asked for, when the server had set its variables."""
    assert told[name]["imported_by"] == told[name]["pid"]
    return bool(told[name]["imported_before"])


def test_the_scheduler_and_the_detokenizer_have_imported_when_they_are_asked_for(sglang: FakeSglang) -> None:
    sglang.run("--tp-size", "1")
    told = sglang.told()
    assert imported_before(told, "scheduler0")
    assert imported_before(told, "detokenizer")
    assert told["scheduler0"]["parent"] == told["detokenizer"]["parent"] == told["server"]["pid"]
    assert told["scheduler0"]["environment"]["SGLANG_RUN_ID"] == "run 5"
    assert told["ends"]["codes"] == [7, 5]


def test_so_have_those_that_the_controller_of_dp_attention_asks_for(sglang: FakeSglang) -> None:
    sglang.run("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention")
    told = sglang.told()
    assert all(imported_before(told, name) for name in ("controller", "scheduler0", "scheduler1", "detokenizer"))
    assert told["controller"]["parent"] == told["server"]["pid"]
    assert told["scheduler0"]["parent"] == told["scheduler1"]["parent"] == told["controller"]["pid"]
    assert told["ends"]["codes"] == [7, 5]


def test_of_an_engine_over_two_machines_each_starts_its_own(sglang: FakeSglang) -> None:
    """The second has no detokenizer."""
    sglang.run("--tp-size", "2", "--nnodes", "2", "--node-rank", "1")
    told = sglang.told()
    assert imported_before(told, "scheduler0")
    assert told["ends"]["children"] == 1  # multiprocessing's own tracker


def test_a_variable_that_imports_may_depend_on_is_imported_with(sglang: FakeSglang) -> None:
    said = sglang.run("--tp-size", "1", late={"OTHER": "1"})
    told = sglang.told()
    assert not imported_before(told, "scheduler0")
    assert not imported_before(told, "detokenizer")
    assert told["scheduler0"]["environment"]["OTHER"] == told["detokenizer"]["environment"]["OTHER"] == "1"
    assert [line for line in said.splitlines() if "have changed" in line] == [
        "SGLang's process imports again, for these variables have changed: OTHER"
    ]


def test_schedulers_that_release_memory_have_preloaded_its_library(sglang: FakeSglang) -> None:
    name = "torch_memory_saver_hook_mode_preload_cu13.abi3.so"
    for file, text in {"torch/version.py": "cuda = '13.0'", "torch/__init__.py": "", name: ""}.items():
        (sglang.folder / file).parent.mkdir(exist_ok=True)
        (sglang.folder / file).write_text(text)
    (sglang.folder / "torch_memory_saver").mkdir()
    (sglang.folder / "torch_memory_saver" / "__init__.py").write_text("")
    sglang.run("--tp-size", "1", "--enable-memory-saver", LIBRARY=str(sglang.folder / name))
    told = sglang.told()
    assert imported_before(told, "scheduler0")
    assert imported_before(told, "detokenizer")
    assert told["scheduler0"]["environment"]["LD_PRELOAD"] == str(sglang.folder / name)
    assert told["detokenizer"]["environment"]["LD_PRELOAD"] is None


def test_a_server_that_is_killed_while_they_import_leaves_none_behind(sglang: FakeSglang) -> None:
    process = sglang.start("--tp-size", "2", "--dp-size", "2", import_s=600)
    importing, deadline = sglang.folder / "told.importing", time.monotonic() + 120
    others: set[str] = set()
    while len(others) < 4:  # controller, its two schedulers, detokenizer; the server imports, too
        assert time.monotonic() < deadline
        time.sleep(0.05)
        whole = importing.read_text().rpartition("\n")[0] if importing.exists() else ""
        others = set(whole.split()) - {str(process.pid)}
    family = [psutil.Process(int(pid)) for pid in others]
    process.kill()
    process.wait()
    assert len(family) == 4
    _, left = psutil.wait_procs(family, timeout=120)
    assert not left
