"""Lets megatron-core 0.16 run on a machine without CUDA, and without Transformer Engine on any machine.

megatron-core names the "cuda" device literally in about forty places. Where CUDA is absent those literals, the streams
and events, and the CUDA random generator are answered by the CPU, so that the very trainer that runs on H100s runs
under gloo. Where CUDA is present only the Transformer Engine flags are set right, and the compiler is kept waiting.
"""

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recipe.megatron.fusion import compiled_when_called

CPU = torch.device("cpu")


def training_device() -> torch.device:
    """The device that parameters and batches of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def to_training_device(array: NDArray[Any]) -> Tensor:
    """A copy there. The process goes on while it is made, which takes pinned memory: from pageable memory it would wait
    until the GPU has done all that it was given before."""
    tensor, device = torch.from_numpy(array), training_device()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def communication_backend() -> str:
    """torch.distributed's backend for the training device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.split(":")[0] == "cuda") or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaMeansCpu(TorchFunctionMode):
    """Redirects literal "cuda" devices to the CPU, and lets megatron's checks of tensor type names pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        return func(*args, **kwargs)


class _NoStream:
    """A CUDA stream or event of a machine where everything happens at once and in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> "_NoStream":
        return self

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record = wait = synchronize = wait_stream

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _replace_cuda_runtime() -> None:
    stream = _NoStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda chosen: chosen,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _use_cpu_random_state() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _leave_dispatcher_splits_on_cpu() -> None:
    """The all-to-all dispatcher hands its splits over as numpy arrays, but converts CUDA tensors only."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _import_what_is_used() -> None:
    """megatron compiles its small functions. On a GPU the first call of each may do that, not the import; on a CPU it
    takes half a minute and gains nothing. What compiles them is chosen when megatron is first imported, and whether its
    timers, which nothing here reads, can write to TensorBoard."""
    compiler = compiled_when_called if torch.cuda.is_available() else lambda function: function
    with mock.patch.object(torch, "compile", compiler), _absent("torch.utils.tensorboard"):
        importlib.import_module("megatron.core.jit")


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Whoever imports the module meanwhile is told that it is not installed."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before


def _acknowledge_absent_transformer_engine() -> None:
    """megatron-core believes that Transformer Engine is there because its wrapper module imports with mocks."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as multi_latent_attention

    multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


_prepared = False


def prepare() -> None:
    """Applies what this machine needs, once a process."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    # megatron announces in every process that Apex and Transformer Engine are absent, which is as we want it.
    warnings.filterwarnings("ignore", message=".*(Apex is|Apex are) not installed.*")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|megatron\.core\.dist_checkpointing"
    )
    # `layout.join` has made a rank's own GPU that device. Were torch told of it beforehand, it would make communicators
    # for all of megatron's groups at once, also for those that nobody uses.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # Its MoE layer is known to it by name; ours, which is one, is built in the same way.
    transformer_layer = logging.getLogger("megatron.core.transformer.transformer_layer")
    transformer_layer.addFilter(lambda record: "Unknown MLP type" not in record.getMessage())
    _import_what_is_used()
    if not torch.cuda.is_available():
        _replace_cuda_runtime()
        _use_cpu_random_state()
        _leave_dispatcher_splits_on_cpu()
        CudaMeansCpu().__enter__()
    if importlib.util.find_spec("transformer_engine") is None:
        _acknowledge_absent_transformer_engine()
