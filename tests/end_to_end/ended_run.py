"""A run whose engine fails at a moment that is hard to meet from outside: python -m ended_run WAY [the flags of
recipe.train].

`between`: the engine is killed between two rollouts, when it is asked whether it is alive. `weights`: it is stopped
when version 2 of the weights is sent to it.
"""

import os
import signal
import sys
from collections.abc import Mapping

import psutil
import run_support

from recipe.cluster.engine_group import EngineGroup
from recipe.cluster.trainer_group import TrainerGroup
from recipe.system.errors import run_main
from recipe.train import main
from recipe.weight_sync.result import UpdateResult

replace_dead, update_weights = EngineGroup._replace_dead, TrainerGroup.update_weights
asked: list[EngineGroup] = []


def struck_between(self: EngineGroup) -> None:
    """`EngineGroup._replace_dead`, with the engine's death before the third call."""
    asked.append(self)
    if len(asked) == 3:
        strike(signal.SIGKILL)
    replace_dead(self)


def struck_update(self: TrainerGroup, engines: Mapping[int, str], version: str) -> UpdateResult:
    """`TrainerGroup.update_weights`, to an engine that hangs."""
    if version == "2":
        strike(signal.SIGSTOP)
    return update_weights(self, engines, version)


def strike(number: signal.Signals) -> None:
    [engine] = run_support.engines(psutil.Process())
    os.killpg(engine.pid, number)
    print(f"engine {engine.pid} is struck", flush=True)


if __name__ == "__main__":
    way = sys.argv.pop(1)
    if way == "between":
        EngineGroup._replace_dead = struck_between  # type: ignore[method-assign]
    else:
        TrainerGroup.update_weights = struck_update  # type: ignore[method-assign]
    run_main(main)
