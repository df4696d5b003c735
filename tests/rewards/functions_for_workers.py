"""Functions that the tests let worker processes call."""

import asyncio
import os
import sys
import time
from pathlib import Path


def same(left: str, right: str) -> bool:
    return left == right


def obey(command: str, argument: str) -> bool:
    """Does what the test says."""
    match command:
        case "sleep":
            time.sleep(float(argument))
        case "touch":
            Path(argument).touch()
            time.sleep(600)
        case "compute":
            return 9 ** (9 ** int(argument)) > 0  # one instruction: neither threads nor signals get a turn
        case "raise":
            raise ValueError(argument)
        case "die":
            os._exit(int(argument))
        case "eat":
            return bytes(int(argument)) != b""
        case "pid":
            return os.getpid() == int(argument)
    return True


def half_or_fail(prompt: str, response: str, label: str) -> object:
    """A custom reward that does what the response says."""
    match response:
        case "bad":
            raise KeyError(label)
        case "nan":
            return float("nan")
        case "hang":
            return 9 ** (9**9)  # one instruction: neither threads nor signals get a turn
        case "leave":
            sys.exit(3)
        case "die":
            os._exit(4)
        case "nothing":
            return None
        case "numpy" | "torch":
            module = __import__(response)
            return module.float32(0.5) if response == "numpy" else module.tensor([0.5])
    return 0.5 * (prompt + label == "qa")


async def later(prompt: str, response: str, label: str) -> float:
    """A custom reward that is a coroutine."""
    await asyncio.sleep(float(response))
    return len(label)


async def longest(prompt: str, responses: list[str], label: str) -> list[float]:
    """A custom reward that sees the group: 1 for its longest response; one too few where a response says so."""
    await asyncio.sleep(0)
    most = max(map(len, responses))
    return [float(len(response) == most) for response in responses if response != "drop"]
