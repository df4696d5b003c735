"""Asynchronous runs beside the synchronous one: what the ideal is, and how much of it is reached."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_async.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_async", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["bench_async"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(bench: ModuleType, name: str, step_s: float, rollout_s: float, **others: float):
    """A run of slow first steps, equal ones, and a quick last one; training takes a second, and evaluating ten."""
    step = {"seconds_step": step_s + 10, "seconds_eval": 10.0, "seconds_train": 1.0, "seconds_rollout": rollout_s}
    step |= {"samples": 8, "staleness_mean": 0.0, "staleness_max": 0.0, **others}
    slow, quick = step | {"seconds_step": 99.0}, step | {"seconds_step": 10.5}
    return bench.Measured(name, [slow] * bench.UNTIMED_STEPS + [step] * 4 + [quick], most_ahead=1)


def test_the_ideal_is_the_step_without_the_shorter_of_its_two_parts(bench: ModuleType) -> None:
    synchronous = made_up(bench, "synchronous", 3.0, 2.0)
    half = made_up(bench, "fixed-1", 2.4, 1.4, staleness_mean=0.9, staleness_max=1, seconds_engines_idle=1.24)
    reaches = made_up(bench, "fixed-2", 2.0, 1.0, staleness_max=2, **{"eval/heldout": 0.5})
    ideal, _, *rows = bench.report(synchronous, [half, reaches]).splitlines()
    assert ideal == "ideal: 1.50 times as fast (2.000 s a step in place of 3.000)"
    assert [row.split() for row in rows] == [
        ["synchronous", "3.000", "2.7", "1.00", "67%", "0.00", "0", "67%", "-", "-"],
        ["fixed-1", "2.400", "3.3", "1.25", "83%", "0.90", "1", "58%", "10%", "-"],
        ["fixed-2", "2.000", "4.0", "1.50", "100%", "0.00", "2", "50%", "0%", "0.500"],
    ]
