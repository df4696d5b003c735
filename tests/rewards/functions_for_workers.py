"""Functions that the tests let worker processes call."""

import os
import time


def same(left: str, right: str) -> bool:
    return left == right


def obey(command: str, argument: str) -> bool:
    """Does what the test says."""
    match command:
        case "sleep":
            time.sleep(float(argument))
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
