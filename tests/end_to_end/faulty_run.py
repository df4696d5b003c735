"""A run in which a training rank fails: python -m faulty_run RANK WAY [the flags of recipe.train].

In its fifth microbatch rank RANK falls asleep, is stopped, or is killed.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from recipe.cluster import trainer_group as trainer
from recipe.messages import Started
from recipe.system.errors import run_main
from recipe.train import main

MICROBATCH = 5
RANK, WAY = "RECIPE_FAULTY_RANK", "RECIPE_FAULTY_WAY"
"""The environment's variables that tell the ranks which of them fails, and how."""


def fall_asleep() -> None:
    time.sleep(3600)


WAYS: dict[str, Callable[[], None]] = {
    "sleep": fall_asleep,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class FaultyRank(trainer.RankActor):
    """A rank that may be the one that fails."""

    def start(self, store_address: tuple[str, int], threads: int) -> Started:
        started = super().start(store_address, threads)
        if str(self.rank) == os.environ[RANK]:
            from recipe.megatron import step

            step.build_microbatch = failing(step.build_microbatch)
        return started


def failing(build_microbatch: Callable) -> Callable:
    """`build_microbatch`, with the failure before call MICROBATCH."""
    good = iter(range(1, MICROBATCH))

    def build(*arguments: Any) -> Any:
        if next(good, None) is None:
            WAYS[os.environ[WAY]]()
        return build_microbatch(*arguments)

    return build


if __name__ == "__main__":
    import faulty_run  # Ray's workers find the class by this name

    _, os.environ[RANK], os.environ[WAY], *flags = sys.argv
    trainer.RankActor = faulty_run.FaultyRank  # type: ignore[misc]
    sys.argv = ["recipe.train", *flags]
    run_main(main)
