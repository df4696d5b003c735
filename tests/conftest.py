"""What tests of every folder share: Hypothesis without a clock, and real SGLang for those that speak to it."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter of an environment with SGLang's CPU build; made first, if it is not there yet."""
    subprocess.run(["scripts/install.sh", ".venv-sglang", "sglang-cpu"], cwd=ROOT, check=True, timeout=600)
    return ROOT / ".venv-sglang" / "bin" / "python"
