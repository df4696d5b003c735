"""The scripts that measure and compare the trainer, in their small form on a CPU."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def check_layouts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import check_layouts

    return check_layouts


def script(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / name, "--device", "cpu", *flags], capture_output=True, text=True, timeout=240
    )


def test_layouts_are_compared(check_layouts: ModuleType) -> None:
    """Where gradients are sharded over ranks (DP2) and over stages (PP2), and with the yardstick of other kernels."""
    ended = script("check_layouts.py", "--layouts", "DP2", "PP2-uneven", "--precisions", "bf16")
    assert ended.returncode == 0, ended.stderr
    verdicts = [line.split()[:2] for line in ended.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
    assert verdicts == [["ok", "one"]] * len(check_layouts.OTHERS) + [["ok", "DP2"], ["ok", "PP2-uneven"]]


@pytest.mark.parametrize(
    ("gradient", "losses", "norms", "holds"),
    [(1e-5, 0.0, 1e-5, True), (2e-4, 0.0, 0.0, False), (0.0, 2e-4, 0.0, False), (0.0, 0.0, 2e-4, False)],
)
def test_one_figure_that_is_apart_fails_a_layout(
    check_layouts: ModuleType, gradient: float, losses: float, norms: float, holds: bool
) -> None:
    found = check_layouts.Difference({"one": 0.0, "another": gradient}, losses, norms)
    unit = check_layouts.Difference.everywhere(1.0, found)
    told, verdict = check_layouts.row("EP2", found, unit, check_layouts.EXACT, 1.0)
    assert verdict is holds
    assert told.startswith("ok" if holds else "FAIL")
