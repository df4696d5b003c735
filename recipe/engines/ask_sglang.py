"""What SGLang's own parser says to arguments: python ask_sglang.py ARGUMENTS, with the interpreter that has SGLang.

Prints a JSON object: `known`, all flags that it has; `error`, the sentence of a refusal, or else `unknown`, the words
that it could not place. It runs in SGLang's environment, so it imports nothing of this project.
"""

import argparse
import json
import sys
import types
from typing import NoReturn

# The parser needs no torchvision, but imports it, which fails where a wheel for CUDA meets a torch for CPUs.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

from sglang.srt.server_args import ServerArgs  # noqa: E402


class _Refusal(Exception):
    """What argparse would have printed before it ended the process."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refusal(message)


def ask(words: list[str]) -> dict[str, object]:
    """The answer to print."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    ServerArgs.add_cli_args(parser)
    known = sorted(flag for action in parser._actions for flag in action.option_strings)
    try:
        _, unknown = parser.parse_known_args(words)
    except _Refusal as refusal:
        return {"known": known, "error": str(refusal)}
    return {"known": known, "unknown": unknown}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1:])))
