"""A worker process: serves one function over a pipe until the pipe or the parent is gone.

Usage: python -m recipe.rewards.serve FILE_DESCRIPTOR MODULE:FUNCTION [FLAG]

With a FLAG, by which a user named it, the function is a custom reward: it may be a coroutine, take any memory, print
and leave, and its value becomes a float. The process first sends an empty text once the function is imported, or why it
cannot be. Then it receives tuples of arguments and sends for each a pair of the function's value and the failure, one
of which is None or empty.
"""

import asyncio
import inspect
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from recipe.system.errors import UserError
from recipe.system.imports import load_function
from recipe.system.parent_death import end_with_parent

MEMORY_BYTES = 2 << 30
"""Address space of a worker: a hostile answer meets a MemoryError, and not the machine's last page."""


def main(descriptor: int, target: str, flag: str | None = None) -> None:
    end_with_parent()
    if flag is None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    connection = Connection(descriptor)
    try:
        call = load_function(flag or "the function", target)
    except UserError as error:
        connection.send(str(error))
        return
    if flag is not None:
        call = _rewarding(call)
    connection.send("")
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = (call(*arguments), "")
        except (Exception, SystemExit) as error:
            reply = (None, f"{type(error).__name__}: {error}"[:200])
        connection.send(reply)


def _rewarding(function: Callable[..., Any]) -> Callable[..., float | list[float]]:
    """The function, waited for if it is a coroutine, its value as a float, or a list of them for several responses."""
    loop = asyncio.new_event_loop()  # one for all calls: what a function keeps between them may belong to it

    def reward(prompt: str, response: str | list[str], label: str) -> float | list[float]:
        value = function(prompt, response, label)
        if inspect.isawaitable(value):
            value = loop.run_until_complete(_waited_for(value))
        if isinstance(response, str):
            return float(value)
        rewards = [float(one) for one in value]
        if len(rewards) != len(response):
            raise ValueError(f"{len(rewards)} rewards for {len(response)} responses")
        return rewards

    return reward


async def _waited_for(value: Any) -> Any:
    return await value


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
