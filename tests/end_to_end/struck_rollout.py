"""A run whose engines fail while they generate: python -m struck_rollout [the flags of recipe.train].

Before the third request of the rollout of version 2, when one is answered and one is under way, an engine is stopped
and the other one is killed; before the first of version 4 the owner of one.
"""

from collections import Counter
from collections.abc import Sequence

import psutil
import run_support

from recipe.generation.turns import Request
from recipe.rollout.client import RolloutClient
from recipe.rollout.fleet import EnginePeer
from recipe.system.errors import run_main
from recipe.train import main

send = RolloutClient._send
sent: Counter[str] = Counter()
"""Requests, by version."""


async def struck_send(self: RolloutClient, engine: EnginePeer, todo: Sequence[Request], *, routed: bool) -> object:
    """`RolloutClient._send`, with the failures before."""
    sent[self._version] += 1
    if (self._version, sent[self._version]) == ("2", 3):
        run_support.strike(*run_support.engines(psutil.Process()))
    if (self._version, sent[self._version]) == ("4", 1):
        owner = run_support.engines(psutil.Process())[0].parent()
        assert owner is not None
        owner.kill()
    return await send(self, engine, todo, routed=routed)


if __name__ == "__main__":
    RolloutClient._send = struck_send  # type: ignore[method-assign]
    run_main(main)
