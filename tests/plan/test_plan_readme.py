"""The plan's figures in the README are what the plan says."""

import re
from pathlib import Path

import pytest

from recipe.config import sglang_rules
from recipe.plan.__main__ import PUBLISHED, resolve_without_weights
from recipe.plan.hardware import GB, GIB, Machine
from recipe.plan.plan import make_plan

README = (Path(__file__).parents[2] / "README.md").read_text()
RECIPES = ("8gpu", "8gpu-mtp", "16gpu", "24gpu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_disk_time_and_money_of_a_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    resolved = resolve_without_weights(["--recipe", f"glm4.7-flash-{recipe}", "--hf-checkpoint", str(PUBLISHED)])
    plan = make_plan(resolved, Machine.described("H100-80GB", 8, "1TB", "2TB", 2.5), on_gpu=True)
    assert plan.gpu is not None
    assert plan.time is not None
    gpu = min(plan.gpu.phases, key=lambda one: one.margin)
    host = min(plan.host, key=lambda one: one.margin)
    per_machine = " a machine" * (resolved.config.cluster.actor_num_nodes > 1)
    [cells] = re.findall(rf"^\| {recipe} \([^|]*\) \| (.*) \|$", README, re.MULTILINE)
    assert cells.split(" | ") == [
        f"{gpu.phase} {gpu.total / GIB:.1f} GiB, {gpu.margin / GIB:.1f}",
        f"{host.phase} {host.total / GB:.0f} GB{per_machine}",
        f"{plan.disk.needed / GB / 1000:.1f} TB",
        f"{plan.time.step_s:.0f} s, ${plan.time.dollars_a_step:.2f}",
        f"{plan.time.hours:,.0f} h, ${plan.time.dollars:,.0f}",
    ]
    assert f"| {plan.time.rollouts:,} steps |" in README


def test_the_rented_nodes_first_training() -> None:
    """What its table says is the plan's table for so many steps."""
    [hours, dollars] = re.findall(r"100 of 3,000 steps \| ([\d.]+) hours .* \$(\d+) \|$", README, re.MULTILINE)[0]
    [of_step, of_run] = re.findall(r"^\| 8gpu \(.* s, \$([\d.]+) \| (\d+) h", README, re.MULTILINE)[0]
    assert float(hours) == pytest.approx(float(of_run) / 30, abs=0.05)
    assert int(dollars) == round(100 * float(of_step))
