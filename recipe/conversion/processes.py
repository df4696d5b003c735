"""The processes that share a conversion or an export: one alone, or those that torchrun started."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

import torch.distributed as dist

from recipe.system.errors import USER_ERROR_STATUS, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number among those that share the work."""

    rank: int
    world_size: int

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Self]:
        """Meets the others, and leaves them in order: gloo's threads, still there when Python ends, would abort it."""
        if "RANK" not in os.environ:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            # torchrun ends the others by SIGTERM when one fails; they may be waiting for it, deaf to Python's handlers.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            dist.init_process_group("gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def first_checks(self, check: Callable[[], None]) -> None:
        """Lets the first process check what concerns all. Where it raises UserError, the others end quietly."""
        problem: list[str | None] = [None]
        if self.is_first:
            try:
                check()
            except UserError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem)
        if problem[0] is not None:
            if self.is_first:
                raise UserError(problem[0])
            sys.exit(USER_ERROR_STATUS)

    def gather(self, own: Mapping[str, T]) -> dict[str, T]:
        """What all processes have."""
        parts: list[Mapping[str, T]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(parts, own)
        return {name: value for part in parts for name, value in part.items()}

    def wait(self) -> None:
        """Returns when all are here."""
        dist.barrier()
