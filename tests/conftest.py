"""Real SGLang for the tests that speak to it, installed once."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter of an environment with SGLang's CPU build; made first, if it is not there yet."""
    subprocess.run(["scripts/install.sh", ".venv-sglang", "sglang-cpu"], cwd=ROOT, check=True, timeout=600)
    return ROOT / ".venv-sglang" / "bin" / "python"
