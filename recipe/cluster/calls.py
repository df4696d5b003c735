"""Calls to actors, with their failures told in a sentence."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from recipe.errors import UserError


def get(references: Sequence[ray.ObjectRef], names: Sequence[str]) -> list[Any]:
    """The results of one call to each of the actors called `names`.

    An actor's UserError is raised as itself; an actor that died is named. Other exceptions of an actor are faults of
    this program and raised with their traceback. The first failure ends the waiting: the other ranks may be stuck in a
    collective operation with the one that failed.
    """
    waiting = dict(zip(references, names, strict=True))
    while waiting:
        done, _ = ray.wait(list(waiting))
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
        lost = [node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]]
        if lost:
            raise UserError(
                f"the node {', '.join(lost)} is lost, and {name} with it: it was taken away, or the network to it is "
                "cut; start again with --load to go on from the last checkpoint"
            ) from None
        raise UserError(
            f"{name} died ({_first_line(error)}): it was killed, most often for want of memory; start again with "
            "--load to go on from the last checkpoint"
        ) from None


def _first_line(error: RayActorError) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
