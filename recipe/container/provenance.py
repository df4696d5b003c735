"""Where an image came from, as it lies in the image: python -m recipe.container.provenance writes it at build time."""

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from recipe.system.files import atomic_write_text, sha256_file

PROVENANCE = Path("/opt/recipe/provenance.json")
"""Only the image has it."""
LOCK = PROVENANCE.with_name("packages.lock")
"""The lock that the image's packages were installed from."""


def inside_image() -> bool:
    """Whether this process runs in the recipe's image."""
    return PROVENANCE.exists()


def read_provenance() -> dict[str, Any]:
    """The image's provenance. Raises OSError or ValueError if it is not there or damaged."""
    found = json.loads(PROVENANCE.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{PROVENANCE} holds no object")
    return found


def build_date(source_date_epoch: int) -> str:
    """Seconds since 1970 as RFC 3339, in UTC."""
    return datetime.fromtimestamp(source_date_epoch, UTC).isoformat().replace("+00:00", "Z")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-image", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--source-date-epoch", required=True, type=int)
    arguments = parser.parse_args()
    _, _, digest = arguments.base_image.partition("@")
    provenance = {
        "base_image": arguments.base_image,
        "base_digest": digest or None,
        "lock_sha256": sha256_file(LOCK),
        "git_commit": arguments.commit,
        "build_date": build_date(arguments.source_date_epoch),
        "python": platform.python_version(),
        "packages": len({package.metadata["Name"] for package in distributions()}),
    }
    atomic_write_text(PROVENANCE, json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
