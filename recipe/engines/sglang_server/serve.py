"""Starts SGLang's own server, prepared: python serve.py SGLANG'S ARGUMENTS

Without a GPU (SGLANG_USE_CPU_ENGINE=1) SGLang 0.5.21 runs GLM-4.7-Flash's architecture in plain torch, but not as it is
installed from the index: this program makes up for that, and for what is wrong on GPUs too. It runs in SGLang's
environment, so it imports nothing of this project; SGLang's own processes, which multiprocessing spawns, import it too
and so are prepared in the same way.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import preloaded

_SPAWNED = "__mp_main__"
"""This module's name in the processes that multiprocessing spawns."""
_PR_SET_PDEATHSIG = 1
_USE_CPU = "SGLANG_USE_CPU_ENGINE"
_UNUSED = ("megatron", "sklearn")
"""Packages that SGLang imports where it finds them, for seconds in each of its processes, and here has no use for: its
dumper for debugging knows megatron's ranks, transformers' assisted generation a metric of sklearn's."""
_INIT = 1
"""The parent of processes that have lost theirs."""


class _Absent(type):
    """A class that stands for anything of a package without a CPU build: it may be imported, named and looked into,
    as SGLang does when it is imported, but not called."""

    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __call__(cls, *arguments: object, **named: object) -> NoReturn:
        raise RuntimeError(f"{cls.__name__} has no CPU build, and this request came to need it")


def _absent(name: str) -> _Absent:
    return _Absent(name, (), {})


class _AbsentPackage(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`sgl_kernel`, SGLang's compiled kernels, whose wheels are for CUDA only. Many modules import it whether they use
    it or not; in this configuration none calls it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def find(name: str) -> _Absent:
            if name.startswith("__"):
                raise AttributeError(name)
            return _absent(f"{module.__name__}.{name}")

        module.__getattr__ = find  # type: ignore[method-assign]


def _absorbed_latent_attention(handlers: types.ModuleType) -> None:
    """MLA on the `torch_native` backend: no handler is registered for it, and the one that SGLang falls back to reads
    the latent cache as if it held full keys and values. The absorbed form reads what is there."""
    handlers.AttentionBackendRegistry.register("torch_native", lambda attention, batch: handlers.AttnForwardMethod.MLA)


def _checksums_without_cuda(checker: types.ModuleType) -> None:
    """/weights_checker waits for the GPU."""
    checker.torch.cuda.synchronize = lambda *arguments: None


def _routing_in_pageable_memory(pools: types.ModuleType) -> None:
    """Where tokens were routed is kept in host memory that the CUDA driver pins."""

    def allocate(shape: Sequence[int], dtype: object, **others: object) -> object:
        return pools.torch.empty(shape, dtype=dtype)

    pools.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _routing_of_verified_drafts(capturer: Any) -> None:
    """With DP attention the rows of a CUDA graph lie in as many parts of one length as there are groups of GPUs. SGLang
    (0.5.17 to 0.5.21) takes the sequences of a part for its length; where drafts are verified each has several rows,
    and every group but the first told of the experts of others' tokens."""
    find = capturer.get_dp_local_slice_cpu

    def find_slice(batch: Any, can_run_graph: bool, sequences: int | None) -> tuple[int, int]:
        start, count = find(batch, can_run_graph, sequences)
        if can_run_graph and batch.batch_size:
            start *= count // batch.batch_size
        return start, count

    capturer.get_dp_local_slice_cpu = find_slice


_MENDED: dict[str, Callable[[types.ModuleType], None]] = {
    "sglang.srt.state_capturer.routed_experts": _routing_of_verified_drafts,
}
"""Modules of SGLang, and what is done to each when it has been imported."""
_MENDED_WITHOUT_GPU: dict[str, Callable[[types.ModuleType], None]] = {
    "sglang.srt.models.deepseek_common.attention_backend_handler": _absorbed_latent_attention,
    "sglang.srt.utils.weight_checker": _checksums_without_cuda,
    "sglang.srt.mem_cache.pool_host.common": _routing_in_pageable_memory,
}


class _Mending(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be mended where they are, and has them mended."""

    def __init__(self, mended: dict[str, Callable[[types.ModuleType], None]]) -> None:
        self.mended = mended

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.mended:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.origin is not None
        loader = _MendingLoader(name, spec.origin, self.mended[name])
        return importlib.util.spec_from_file_location(name, spec.origin, loader=loader)


class _MendingLoader(importlib.machinery.SourceFileLoader):
    """Imports a module as ever, and then mends it."""

    def __init__(self, name: str, path: str, mend: Callable[[types.ModuleType], None]) -> None:
        super().__init__(name, path)
        self.mend = mend

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        self.mend(module)


def prepare() -> None:
    """Makes SGLang importable, and right, in this process."""
    for package in _UNUSED:
        sys.modules[package] = None  # type: ignore[assignment]  # for Python: it is not installed
    sys.meta_path.insert(0, _Mending(_MENDED))
    if os.environ.get(_USE_CPU) != "1":
        return
    # torchvision's wheel is built for CUDA; without that its operators are missing, and describing them fails.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    sys.meta_path[:0] = [_AbsentPackage(), _Mending(_MENDED_WITHOUT_GPU)]


def end_with_parent() -> None:
    """Ends this process of SGLang's when the server ends. SGLang asks for the same, but only when all is imported: a
    server that is killed while it starts would leave its processes behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == _INIT:
        os._exit(1)


def main() -> None:
    """What `python -m sglang.launch_server` does. Run by that name, SGLang's processes would import it and not this."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == _SPAWNED or sys.argv[1:2] == [preloaded.COMMAND]:
    end_with_parent()
if __name__ == "__main__" and sys.argv[1:2] == [preloaded.COMMAND]:
    preloaded.serve_as(sys.argv[2:], __file__, prepare)
elif __name__ == "__main__":
    preloaded.preload(sys.argv[1:], __file__)
    prepare()
    main()
else:
    prepare()
