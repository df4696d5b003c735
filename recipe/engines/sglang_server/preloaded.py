"""Processes that have imported SGLang before it asks for them.

SGLang starts its processes with multiprocessing's spawn, one from another: the server starts the controller of DP
attention, that the schedulers. Each imports for as long as the last, a third of a minute on a GPU machine, and none
begins before its parent is ready. Here their interpreters are started at once, import beside the server, and become
those processes when multiprocessing spawns them: children of the same parent, with the same environment, command and
open files. A process whose environment has come to differ from that which its modules were imported in is not used:
then, and wherever there is none, multiprocessing spawns as ever.

It runs in SGLang's environment, so it imports nothing of this project.
"""

import argparse
import fcntl
import importlib
import importlib.util
import json
import multiprocessing.util
import os
import pickle
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND = "--preloaded"
"""First argument of such a process; then the number of its socket, and of its own processes in turn."""
_SPAWNED = "--multiprocessing-fork"
"""Last argument of what multiprocessing spawns for a `Process`."""
_HELD = range(3, 256)
"""Numbers of open files that are kept free of everything else, for those that come with a command."""

_MODULES = ("sglang.srt.managers.data_parallel_controller", "sglang.srt.managers.detokenizer_manager")
_MODELS = "sglang.srt.models.registry"
"""Imports every model; schedulers alone need it."""

_FORESEEN = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "CUTE_DSL_LOG_LEVEL": "30",
    "CUTE_DSL_LOG_TO_CONSOLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "SGLANG_DISABLE_OUTLINES_DISK_CACHE": "0",
    "SGLANG_ENABLE_DETERMINISTIC_INFERENCE": "0",
    "SGLANG_ENABLE_TORCH_COMPILE": "0",
    "TRTLLM_ENABLE_PDL": "1",
}
"""What SGLang sets before it spawns, unless its arguments say otherwise."""
_READ_LATE = frozenset(
    {
        "CUDA_MODULE_LOADING",
        "FLASHINFER_CUDA_ARCH_LIST",
        "SGLANG_OPT_FP8_WO_A_GEMM",
        "SGLANG_RUN_ID",
        "SGLANG_USE_CUDA_IPC_TRANSPORT",
    }
)
"""What it sets then by what it finds, and no module of this model reads when it is imported."""


@dataclass(frozen=True)
class _Preloaded:
    """One such process, from the side of its parent."""

    pid: int
    channel: socket.socket

    def becomes(self, words: Sequence[str], files: Sequence[int]) -> bool:
        """Has it become what multiprocessing would spawn with these words and open files. Whether it does: not if it
        is no more, and not if a variable is another than when it imported, which the log names."""
        command = pickle.dumps((list(words), list(files), dict(os.environ)))
        try:
            socket.send_fds(self.channel, [b"!"], files)
            self.channel.sendall(command)
            self.channel.shutdown(socket.SHUT_WR)
            with self.channel.makefile() as answer:
                changed = json.loads(answer.read())
        except (OSError, ValueError):
            return False
        if changed:
            print("SGLang's process imports again, for these variables have changed:", *changed, flush=True)
        return not changed

    def end(self) -> None:
        """Has it end, if it has become nothing."""
        self.channel.close()


def preload(arguments: Sequence[str], program: str) -> None:
    """Starts the processes that a server with SGLang's `arguments` will ask for on this machine; `program`, run with
    COMMAND, is to call `serve_as`. multiprocessing has them from now on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--tp-size", "--dp-size", "--pp-size", "--nnodes"):
        parser.add_argument(flag, type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--enable-memory-saver", action="store_true")
    told, _ = parser.parse_known_args(arguments)
    schedulers = told.tp_size * told.pp_size // told.nnodes
    saver = _memory_saver() if told.enable_memory_saver else ""
    if told.dp_size > 1:
        first = [_start(program, schedulers, saver)]
    else:
        first = [_start(program, 0, "", saver, models=True) for _ in range(schedulers)]
    detokenizer = [_start(program, 0, "")] if told.node_rank == 0 else []
    _give_to_multiprocessing([*first, *detokenizer])


def _start(program: str, children: int, their_library: str, library: str = "", *, models: bool = False) -> _Preloaded:
    """One that preloads `library`, and starts `children` schedulers of its own, which preload theirs."""
    environment = {**_FORESEEN, **os.environ}
    if library:
        environment["LD_PRELOAD"] = ":".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
    ours, its = socket.socketpair()
    its.set_inheritable(True)
    words = [sys.executable, program, COMMAND, str(its.fileno()), str(int(models)), str(children)]
    process = os.posix_spawn(sys.executable, [*words, *filter(None, [their_library])], environment)
    its.close()
    return _Preloaded(process, ours)


def _memory_saver() -> str:
    """The library with which SGLang's schedulers give memory back, as torch_memory_saver finds it; "": it is not
    found."""
    saver, torch = importlib.util.find_spec("torch_memory_saver"), importlib.util.find_spec("torch")
    if saver is None or saver.origin is None or torch is None or torch.origin is None:
        return ""
    cuda = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] or ""
    name = f"torch_memory_saver_hook_mode_preload_cu{cuda.partition('.')[0]}.*.so"
    package = Path(saver.origin).parent
    found = [*package.glob(name), *package.parent.glob(name)]
    return str(found[0]) if len(found) == 1 else ""


def _give_to_multiprocessing(preloaded: list[_Preloaded]) -> None:
    """Has multiprocessing take these, in this order, for what it spawns, as long as they are what it would spawn."""
    spawn = multiprocessing.util.spawnv_passfds

    def take(path: bytes, words: Sequence[str], files: Sequence[int]) -> int:
        if preloaded and words[-1] == _SPAWNED:
            process, numbers = preloaded.pop(0), sorted(set(files))
            if os.fsdecode(path) == sys.executable and numbers[-1] in _HELD and process.becomes(words, numbers):
                return process.pid
            for unused in (process, *preloaded):
                unused.end()
            preloaded.clear()
        return spawn(path, words, files)

    multiprocessing.util.spawnv_passfds = take  # type: ignore[assignment]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The variables that differ and that importing may have depended on."""
    return sorted(name for name in {*before, *now} - _READ_LATE if before.get(name) != now.get(name))


def serve_as(arguments: Sequence[str], program: str, prepare: Callable[[], None]) -> None:
    """What a preloaded process does: imports, waits for a command, and does as it says. It ends if none can come."""
    number, models, children, *library = arguments
    channel = socket.socket(fileno=fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, _HELD.stop))
    os.close(int(number))
    held = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    while held[-1] < _HELD.stop - 1:
        held.append(os.dup(held[-1]))
    if int(children):
        _give_to_multiprocessing([_start(program, 0, "", *library, models=True) for _ in range(int(children))])
    prepare()
    for module in (*_MODULES, *([_MODELS] if int(models) else [])):
        importlib.import_module(module)
    told, received, _, _ = socket.recv_fds(channel, 1, len(_HELD))
    if not told:
        return
    with channel.makefile("rb") as command:
        words, files, environment = pickle.load(command)
    changed = _changed(os.environ, environment)
    channel.sendall(json.dumps(changed).encode())
    if changed:
        return
    for number_here, number_wanted in zip(received, files, strict=True):
        os.dup2(number_here, number_wanted)
        os.close(number_here)
    channel.close()
    for place in {*held} - {*files}:
        os.close(place)
    os.environ.update({name: environment[name] for name in _READ_LATE & environment.keys()})
    sys.argv = ["-c", *words[words.index("-c") + 2 :]]
    exec(words[words.index("-c") + 1], {})
