"""The comparison with TRL: what counts as time, and when the target is reached."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made_up import step_metrics

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_tiny.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_tiny", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["bench_tiny"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evaluation_and_checkpoints_are_in_no_step_time(bench):
    phases = bench.our_phases(step_metrics(1, seconds=2.0).as_line())
    assert phases == {"rollout": 1.0, "other": 0.5}


def test_the_target_is_reached_at_an_evaluation_and_costs_the_steps_before_it(bench):
    steps = [{"rollout": 1.0, "other": 0.5}] * 30
    run = bench.Run(bench.OURS, 1, steps, [(0, 0.4), (10, 0.89), (20, 0.91), (30, 0.5)])
    assert run.steps_to(0.9) == 20
    assert run.seconds_to(0.9) == pytest.approx(30.0)
    assert run.steps_to(0.95) is None
    assert run.seconds_to(0.95) is None
    assert run.phase_means() == {"rollout": 1.0, "other": 0.5}


def test_the_report_names_every_run(bench):
    steps = [{"rollout": 0.1, "train": 0.1}] * 30
    runs = [
        bench.Run(side, seed, steps, [(0, 0.4), (10, 0.9 if side == bench.OURS else 0.8)])
        for seed in (1, 2)
        for side in (bench.OURS, bench.TRL)
    ]
    *rows, ours, trl = bench.report(runs, 0.9, 256).splitlines()[1:]
    assert [row.split() for row in rows] == [
        ["ours", "1", "1280", "200", "10", "2.0", "s"],
        ["ours", "2", "1280", "200", "10", "2.0", "s"],
        ["TRL", "1", "1280", "200", "never", "never"],
        ["TRL", "2", "1280", "200", "never", "never"],
    ]
    assert ours == "ours: median 1280 samples/s, 2.0 s to 0.9; ms a step: rollout 100, train 100"
    assert trl.startswith("TRL: median 1280 samples/s, never to 0.9")


def test_a_growing_file_is_read_up_to_its_last_whole_line(bench, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert bench.read_whole_lines(path) == []
    path.write_text('{"step": 1}\n{"st')
    assert bench.read_whole_lines(path) == [{"step": 1}]
