"""Host memory that the trainer takes: by part, and whether there is enough of it before it is touched."""

from collections.abc import Iterable

import torch
from torch import Tensor

from recipe.system.errors import UserError
from recipe.system.memory import available_bytes


def require(needed: int, what: str, remedy: str) -> None:
    """Raises UserError if the ranks of this machine, which need `needed` bytes together, would not fit. The kernel
    hands out memory that it does not have, and kills a process later, when it is used."""
    free = available_bytes()
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB of host memory on this machine, and {free / 1e9:.1f} GB are "
            f"available: {remedy}"
        )


def host_bytes(tensors: Iterable[Tensor]) -> int:
    """Of those tensors that lie in host memory."""
    return sum(tensor.nbytes for tensor in tensors if tensor.device == torch.device("cpu"))
