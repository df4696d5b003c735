"""What SGLang's own parser says to arguments: python ask_sglang.py ARGUMENTS, with the interpreter that has SGLang.

Prints a JSON object: `known`, all flags that it has; `tells_versions`, whether it tells the weight version of each
token; `error`, the sentence of a refusal, or else `unknown`, the words that it could not place. It runs in SGLang's
environment, so it imports nothing of this project.
"""

import argparse
import importlib.util
import json
import sys
import types
from typing import NoReturn

# The parser needs no torchvision, but imports it, which fails where a wheel for CUDA meets a torch for CPUs.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

from sglang.srt.server_args import ServerArgs  # noqa: E402

_VERSIONS = "sglang.srt.utils.weight_versions"
"""SGLang's module that tells whose weights made which tokens of a response; 0.5.17 has none."""


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
    told = {"known": known, "tells_versions": importlib.util.find_spec(_VERSIONS) is not None}
    try:
        _, unknown = parser.parse_known_args(words)
    except _Refusal as refusal:
        return {**told, "error": str(refusal)}
    return {**told, "unknown": unknown}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1:])))
