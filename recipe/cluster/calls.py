"""Calls to actors, with their failures told in a sentence."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from recipe.system.errors import UserError

LOOK_S = 5.0
"""Between two looks at the nodes, while an answer is waited for that need not come."""


class ActorDied(UserError):
    """An actor's process is gone, and its node is not."""


def get(references: Sequence[ray.ObjectRef], names: Sequence[str], timeout_s: float | None = None) -> list[Any]:
    """The results of one call to each of the actors called `names`.

    An actor's UserError is raised as itself; an actor that died is named, and so is one that has no result in time.
    Other exceptions of an actor are faults of this program and raised with their traceback. The first failure ends the
    waiting: the other ranks may be stuck in a collective operation with the one that failed.
    """
    waiting = dict(zip(references, names, strict=True))
    began = time.monotonic()
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=None if timeout_s is None else LOOK_S)
        if timeout_s is not None and not done:
            late = ", ".join(waiting.values())
            if lost := _lost_nodes():
                raise UserError(_loss(lost, late))
            if time.monotonic() - began > timeout_s:
                raise UserError(f"{late} did not answer in {timeout_s:g} s: see the machine, and Ray's logs there")
        for reference in done:
            raise_failure(reference, waiting.pop(reference))
    return ray.get(list(references))


def raise_failure(reference: ray.ObjectRef, name: str) -> None:
    """Raises what `get` does if the call to the actor called `name`, which is over, failed."""
    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayActorError as error:
        if lost := _lost_nodes():
            raise UserError(_loss(lost, name)) from None
        raise ActorDied(
            f"{name} died ({_first_line(error)}): it was killed, most often for want of memory; start again with "
            "--load to go on from the last checkpoint"
        ) from None


def _lost_nodes() -> list[str]:
    return [node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]]


def _loss(nodes: Sequence[str], name: str) -> str:
    return (
        f"the node {', '.join(nodes)} is lost, and {name} with it: it was taken away, or the network to it is cut; "
        "start again with --load to go on from the last checkpoint"
    )


def _first_line(error: RayActorError) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
