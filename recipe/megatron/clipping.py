"""The optimizer step with its gradients clipped to a global norm: the policy's own, and the MTP layer's own.

The MTP layer's gradients are no part of the policy's norm, so that training it does not change the policy's step.
Squares are summed in fp64 and the norm rounded to fp32: it does not depend on how gradients are spread over ranks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer.optimizer import MegatronOptimizer, MixedPrecisionOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from recipe.megatron.device import training_device

PIECE_ELEMENTS = 16 << 20
"""As many elements of a gradient on the CPU are held in fp64 at a time."""
IS_MTP = "is_mtp"
"""Marks the optimizer's parameter groups that hold the MTP layer."""


@dataclass(frozen=True)
class GradientNorms:
    """Norms over all ranks, before clipping; 0 for an MTP layer that is not trained."""

    policy: float
    mtp: float

    @property
    def are_finite(self) -> bool:
        """Whether a step may be taken."""
        return math.isfinite(self.policy) and math.isfinite(self.mtp)


def gradient_norms(optimizer: MegatronOptimizer) -> GradientNorms:
    """Hands the accumulated gradients to the optimizer. Returns their norms, the same on every rank."""
    optimizer.prepare_grads()
    squares = torch.zeros(2, dtype=torch.float64, device=training_device())
    for part, group in _groups(optimizer):
        gradients = _counted_gradients(part, group["params"])
        if pieces := [piece for gradient in gradients for piece in gradient.view(-1).split(PIECE_ELEMENTS)]:
            norms = torch._foreach_norm(pieces, 2, dtype=torch.float64)
            squares[int(group.get(IS_MTP, False))] += torch.stack(norms).square().sum()
    dist.all_reduce(squares)
    return GradientNorms(*squares.sqrt().float().tolist())


@torch.no_grad()
def clipped_step(optimizer: MegatronOptimizer, norms: GradientNorms, clip_grad: float) -> None:
    """Steps with gradients of these norms, clipped to the global norm `clip_grad` (0: not at all). Returns before the
    GPU has done so."""
    if clip_grad > 0:
        for _, group in _groups(optimizer):
            norm = norms.mtp if group.get(IS_MTP) else norms.policy
            group["clip"] = min(1.0, clip_grad / (norm + 1e-6))
    # The largest first: while the GPU is at it the process launches the small ones. Weights are gathered once, where
    # megatron's chained step gathers all of them after each part.
    for part in sorted(_parts(optimizer), key=_elements, reverse=True):
        MixedPrecisionOptimizer.step_with_ready_grads(part)
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _elements(part: MegatronOptimizer) -> int:
    return sum(parameter.numel() for group in part.optimizer.param_groups for parameter in group["params"])


def _groups(optimizer: MegatronOptimizer) -> Iterator[tuple[MegatronOptimizer, dict[str, Any]]]:
    for part in _parts(optimizer):
        yield from ((part, group) for group in part.optimizer.param_groups)


def _is_decoupled(part: MegatronOptimizer) -> bool:
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def _counted_gradients(part: MegatronOptimizer, parameters: Iterable[Any]) -> Iterable[Tensor]:
    """The gradients of parameters, those of copies (tied or tensor-parallel) left out."""
    for parameter in parameters:
        gradient = parameter.decoupled_grad if _is_decoupled(part) else parameter.grad
        is_copy = not tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter, getattr(part, "tp_group", None))
        if gradient is not None and param_is_not_shared(parameter) and not is_copy:
            yield gradient
