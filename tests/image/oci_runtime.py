#!/usr/bin/env python3
"""runc, for a machine that may not raise limits: what containers ask for beyond its own hard limits is lowered to them.

Stands between dockerd and runc in the tests; it proves what was asked for, not that the limit is in force.
"""

import json
import os
import resource
import sys
from pathlib import Path

CAPABILITY = "CAP_SYS_RESOURCE"


def bundle(arguments: list[str]) -> Path:
    """The container's folder."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word in ("--bundle", "-b"):
            return Path(following)
        if word.startswith("--bundle="):
            return Path(word.partition("=")[2])
    return Path()


def clamp(path: Path) -> None:
    """Rewrites a container's config.json."""
    config = json.loads(path.read_text())
    process = config["process"]
    for limit in process.get("rlimits") or []:
        hard = resource.getrlimit(getattr(resource, limit["type"]))[1]
        if hard != resource.RLIM_INFINITY:
            limit["hard"] = min(limit["hard"], hard)
            limit["soft"] = min(limit["soft"], hard)
    for names in (process.get("capabilities") or {}).values():
        if CAPABILITY in names:
            names.remove(CAPABILITY)
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "create" in arguments or "run" in arguments:
        clamp(bundle(arguments) / "config.json")
    os.execvp("runc", ["runc", *arguments])
