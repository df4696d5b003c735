"""A group whose engines' actors are threads of this process, without Ray."""

from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipe.cluster import engine_group
from recipe.cluster.engine_group import EngineGroup
from recipe.cluster.placement import Placement
from recipe.config import Resolved


class LocalActor:
    """Stands for Ray's handle of an actor, and has one thread, which carries out one verb after the other."""

    def __init__(self, carried: Any) -> None:
        self.carried = carried
        self._thread = futures.ThreadPoolExecutor(1)

    def __getattr__(self, verb: str) -> Any:
        return SimpleNamespace(remote=partial(self._thread.submit, getattr(self.carried, verb)))


class LocalRay:
    """Stands for Ray, whose references are futures."""

    @staticmethod
    def wait(
        references: Sequence[futures.Future], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[futures.Future], list[futures.Future]]:
        until = futures.ALL_COMPLETED if num_returns == len(references) else futures.FIRST_COMPLETED
        done, late = futures.wait(references, timeout, until)
        return list(done), list(late)

    @staticmethod
    def kill(actor: LocalActor) -> None:
        actor.carried.stop()


def get(references: Sequence[futures.Future], names: Sequence[str], timeout_s: float | None = None) -> list[Any]:
    """Stands for `calls.get`."""
    return [reference.result(timeout_s) for reference in references]


def local_group(resolved: Resolved, make: Callable[[int], Any], patch: pytest.MonkeyPatch) -> EngineGroup:
    """A group whose actors are what `make` makes of their engines' numbers."""
    patch.setattr(engine_group, "ray", LocalRay)
    patch.setattr(engine_group, "get", get)
    patch.setattr(EngineGroup, "_new_actor", lambda _, number: LocalActor(make(number)))
    return EngineGroup(resolved, cast(Placement, None))
