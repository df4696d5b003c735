"""AdamW for megatron's distributed optimizer, without apex or Transformer Engine (Adam: arXiv:1412.6980, decoupled
weight decay: arXiv:1711.05101).

megatron expects apex's contract: one integer step for a parameter group, and for each parameter the states exp_avg and
exp_avg_sq. `MasterAdam` owns the fp32 master weights too, on the device or in host memory ("CPU Adam"): 12 bytes a
parameter. Gradients are clipped as they are read: a group's "clip", which serves one step, is what they are multiplied
by.
"""

from collections.abc import Iterator
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import numpy as np
import torch
from megatron.core.optimizer import distrib_optimizer
from numpy.typing import NDArray
from torch import Tensor

from recipe.megatron.device import to_training_device
from recipe.megatron.fusion import fused, in_rows
from recipe.plan.constants import SLOT_ELEMENTS


class Adam:
    """AdamW by torch's fused kernel, its state beside the fp32 shards that megatron hands over. It has what megatron
    asks of a torch.optim.Optimizer and is none: that imports torch's compiler as soon as it is built."""

    state_names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is implemented"
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        given = list(params)
        groups = given if isinstance(given[0], dict) else [{"params": given}]
        self.param_groups: list[dict[str, Any]] = [settings | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def allocate(self) -> None:
        """Allocates all state, and fills none of it: a checkpoint does, or `begin`."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                self.state[parameter] = self._allocated(parameter)

    def _allocated(self, parameter: Tensor) -> dict[str, Tensor]:
        return {name: torch.empty_like(parameter) for name in self.state_names}

    def begin(self) -> None:
        """The state before the first step: no momentum, and master weights equal to the parameters."""
        for state in self.state.values():
            for name in Adam.state_names:
                state[name].zero_()
        self.reload_masters()

    def reload_masters(self) -> None:
        """Takes the master weights over from the parameters; there is nothing to do where megatron holds them."""

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """megatron's accessor of a state tensor."""
        return self.state[parameter][name]

    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """megatron's mutator of a state tensor. A checkpoint that was read into the tensor itself needs no copy."""
        state = self.state[parameter][name]
        if state.data_ptr() != value.data_ptr():
            state.copy_(value)

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """States and groups in torch's form: parameters are numbered through all groups."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        return {
            "state": {numbers[parameter]: state for parameter, state in self.state.items()},
            "param_groups": [
                {**group, "params": [numbers[parameter] for parameter in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the states as they are: torch's own would cast them to the parameter's type. The groups' settings
        stay this run's: they are not stored, and megatron, which matches groups by few of them, mixes them up."""
        saved_ids = [saved for group in state_dict["param_groups"] for saved in group["params"]]
        for saved_id, parameter in zip(saved_ids, self._parameters, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                self.set_scaled_state(parameter, name, value)

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW step of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.numel() and self._gradient(p) is not None]
            clip = group.pop("clip", 1.0)
            if parameters:
                self._step_group(group, parameters, clip)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], clip: float) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            fused_adamw(group, clip, parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])


def fused_adamw(
    group: dict[str, Any], clip: float, parameter: Tensor, gradient: Tensor, average: Tensor, square_average: Tensor
) -> None:
    """torch's fused AdamW kernel on tensors of equal shape, in place, with the group's hyperparameters. A gradient that
    is clipped is overwritten."""
    torch._fused_adamw_(
        [parameter],
        [gradient],
        [average],
        [square_average],
        [],
        [torch.tensor(float(group["step"]), device=parameter.device)],
        amsgrad=False,
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        grad_scale=None if clip == 1 else torch.tensor(1 / clip, device=parameter.device),
    )


@fused
def rounding_adamw(
    weights: Tensor, master: Tensor, gradient: Tensor, average: Tensor, square_average: Tensor, numbers: Tensor
) -> None:
    """A step of AdamW in one pass that rounds the master weights to `weights` too. `numbers` [1, 8] as of
    `_numbers`."""
    clip, keep, new, square_keep, square_new, size, correction, eps = numbers[0].unbind()
    clipped = gradient.float() * clip
    moment = average + new * (clipped - average)
    square = square_keep * square_average + square_new * clipped * clipped
    stepped = keep * master - size * moment / (square.sqrt() * correction + eps)
    average.copy_(moment)
    square_average.copy_(square)
    master.copy_(stepped)
    weights.copy_(stepped)


def _numbers(group: dict[str, Any], clip: float) -> NDArray[np.float32]:
    """What `rounding_adamw` multiplies by in this step, [1, 8] in fp32."""
    (beta1, beta2), step, rate = group["betas"], group["step"], float(group["lr"])
    size, correction = rate / (1 - beta1**step), (1 - beta2**step) ** -0.5
    keep = 1 - rate * group["weight_decay"]
    numbers = [clip, keep, 1 - beta1, beta2, 1 - beta2, size, correction, group["eps"]]
    return np.array([numbers], dtype=np.float32)


class MasterAdam(Adam):
    """AdamW that owns the fp32 master weights of bf16 parameters, in host memory for those that are offloaded.

    It follows megatron's contract of a precision-aware optimizer: the gradient is `parameter.decoupled_grad`. On CUDA
    the step of what is offloaded is a pipeline over pieces of SLOT_ELEMENTS: while the CPU steps one piece, the next
    one's gradient comes out and the previous one's weights go back.
    """

    state_names = ("exp_avg", "exp_avg_sq", "master_param")

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._in_host: set[Tensor] = set()
        self._stage: _Stage | None = None

    def offload(self, fraction: float) -> None:
        """Keeps this share of the elements in host memory, as closely as whole parameters make it up: from the largest
        to the smallest, each that brings it nearer. To be called before `allocate`."""
        seen = offloaded = 0
        for parameter in sorted(self._parameters, key=Tensor.numel, reverse=True):
            seen += parameter.numel()
            if offloaded + parameter.numel() / 2 <= fraction * seen:
                offloaded += parameter.numel()
                self._in_host.add(parameter)

    @property
    def needed_host_bytes(self) -> int:
        """Host memory that the state takes."""
        return sum(parameter.numel() for parameter in self._in_host) * len(self.state_names) * torch.float32.itemsize

    def _allocated(self, parameter: Tensor) -> dict[str, Tensor]:
        device = "cpu" if parameter in self._in_host else parameter.device
        return {name: torch.empty(parameter.shape, dtype=torch.float32, device=device) for name in self.state_names}

    def reload_masters(self) -> None:
        """Takes the master weights over from the parameters."""
        leaving = []
        for parameter, state in self.state.items():
            weights, master = parameter.detach(), state["master_param"]
            if weights.is_cuda and not master.is_cuda and weights.numel():
                leaving.append((weights, master))
            else:
                master.copy_(weights)
        if leaving:
            self._staged(leaving[0][0].dtype).fill(leaving)

    def _gradient(self, parameter: Tensor) -> Tensor:
        return parameter.decoupled_grad  # type: ignore[attr-defined]

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], clip: float) -> None:
        numbers = to_training_device(_numbers(group, clip))
        # The largest first: while the GPU is at them the process launches the small ones.
        by_size = sorted(parameters, key=Tensor.numel, reverse=True)
        work = [(parameter, self._gradient(parameter), self.state[parameter]) for parameter in by_size]
        for parameter, gradient, state in work:
            if parameter not in self._in_host:
                master, average, square = state["master_param"], state["exp_avg"], state["exp_avg_sq"]
                tensors = (parameter.detach(), master, gradient, average, square)
                weights, master, gradient, average, square = (in_rows(tensor.view(-1)) for tensor in tensors)
                rounding_adamw(weights, master, gradient, average, square, numbers)
        leaving = [one for one in work if one[0] in self._in_host]
        if leaving and leaving[0][0].is_cuda:
            self._staged(leaving[0][0].dtype).run(group, clip, leaving)
            return
        for parameter, gradient, state in leaving:
            master = state["master_param"]
            fused_adamw(group, clip, master, gradient.float(), state["exp_avg"], state["exp_avg_sq"])
            parameter.copy_(master)

    def _staged(self, weight_dtype: torch.dtype) -> "_Stage":
        if self._stage is None:
            self._stage = _Stage(weight_dtype)
        return self._stage


class _Stage:
    """Two pinned slots each way, and a CUDA stream each way."""

    def __init__(self, weight_dtype: torch.dtype) -> None:
        self.gradients = [torch.empty(SLOT_ELEMENTS, dtype=torch.float32, pin_memory=True) for _ in range(2)]
        self.weights = [torch.empty(SLOT_ELEMENTS, dtype=weight_dtype, pin_memory=True) for _ in range(2)]
        self.outgoing, self.returning = torch.cuda.Stream(), torch.cuda.Stream()

    def fill(self, work: list[tuple[Tensor, Tensor]]) -> None:
        """Takes every master of the (weights, master) of `work` over from its weights: they cross the bus as they are,
        the next piece while all threads widen this one."""
        pieces = [
            (weights.view(-1)[part], master.view(-1)[part]) for weights, master in work for part in _parts(weights)
        ]
        self.outgoing.wait_stream(torch.cuda.current_stream())
        fetched = self._fetch(self.weights[0], pieces[0][0])
        for number, (_, master) in enumerate(pieces):
            following = None
            if number + 1 < len(pieces):
                following = self._fetch(self.weights[(number + 1) % 2], pieces[number + 1][0])
            fetched.synchronize()
            master.copy_(self.weights[number % 2][: master.numel()])
            if following is not None:
                fetched = following

    def run(self, group: dict[str, Any], clip: float, work: list[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> None:
        """Steps every (parameter, gradient, state) of `work`."""
        pieces = [
            (parameter.view(-1), gradient.view(-1), state, part)
            for parameter, gradient, state in work
            for part in _parts(parameter)
        ]
        current = torch.cuda.current_stream()
        self.outgoing.wait_stream(current)
        self.returning.wait_stream(current)
        fetched = self._fetch(self.gradients[0], pieces[0][1][pieces[0][3]])
        returned: list[torch.cuda.Event | None] = [None, None]
        for number, (weights, _, state, part) in enumerate(pieces):
            slot, size = number % 2, part.stop - part.start
            # The other slot's gradient was consumed by the piece before this one.
            following = None
            if number + 1 < len(pieces):
                following = self._fetch(self.gradients[1 - slot], pieces[number + 1][1][pieces[number + 1][3]])
            fetched.synchronize()
            master, average, square = (state[name].view(-1)[part] for name in ("master_param", "exp_avg", "exp_avg_sq"))
            fused_adamw(group, clip, master, self.gradients[slot][:size], average, square)
            if (event := returned[slot]) is not None:
                event.synchronize()
            self.weights[slot][:size].copy_(master)
            returned[slot] = self._return(slot, weights[part])
            if following is not None:
                fetched = following
        for event in returned:
            if event is not None:
                event.synchronize()
        current.wait_stream(self.returning)

    def _fetch(self, slot: Tensor, piece: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.outgoing):
            slot[: piece.numel()].copy_(piece, non_blocking=True)
            return self.outgoing.record_event()

    def _return(self, slot: int, weights: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.returning):
            weights.copy_(self.weights[slot][: weights.numel()], non_blocking=True)
            return self.returning.record_event()


def _parts(tensor: Tensor) -> Iterator[slice]:
    """The pieces in which a tensor passes through a slot."""
    for start in range(0, tensor.numel(), SLOT_ELEMENTS):
        yield slice(start, min(start + SLOT_ELEMENTS, tensor.numel()))


def install(optimizer_class: type[Adam]) -> None:
    """Makes megatron build its distributed optimizer on `optimizer_class`, as if it were apex's FusedAdam."""
    megatron_optimizer.Adam = distrib_optimizer.Adam = optimizer_class
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    megatron_optimizer.is_te_min_version = lambda *_, **__: False
