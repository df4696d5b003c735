"""What a measured training step and weight update make of a plan: nothing where they took what was planned, and else
their own phase as much longer or shorter."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.config import Resolved, sglang_rules
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.measured_work import MeasuredWork, WorkKind
from recipe.plan.memory import GpuModel
from recipe.plan.node import Rates, machine_as_measured, read_rates
from recipe.plan.options import PUBLISHED, resolve_without_weights
from recipe.plan.ranges import Between, Pace
from recipe.plan.speed import SpeedModel
from recipe.plan.time_plan import Work
from recipe.smoke import training
from recipe.system.errors import UserError

RECIPE = "glm4.7-flash-8gpu"
WITH_PASSES = ("--kl-loss-coef", "0.001")
"""The reference model goes forward too."""
ON_THE_GPU = ("--no-optimizer-cpu-offload", "--no-overlap-cpu-optimizer-d2h-h2d", "--no-use-precision-aware-optimizer")
MEASURED = (Work.TRAIN, Work.OPTIMIZER, Work.UPDATE_WEIGHTS)
LENGTHS = Lengths.log_normal(3000, 0.6, 8192)
H100 = Machine.described("H100", 8, "1TB", None, 2.5)


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


@cache
def resolved_of(recipe: str, *flags: str) -> Resolved:
    return resolve_without_weights(["--recipe", recipe, "--hf-checkpoint", str(PUBLISHED), *flags])


def model_of(resolved: Resolved, pace: Pace, work: tuple[MeasuredWork, ...] = ()) -> SpeedModel:
    machine = machine_as_measured(H100, Rates(host_memory=2e11, gpus=8, work=work))
    return SpeedModel(GpuModel.of(resolved, machine, on_gpu=True), LENGTHS, LENGTHS, pace)


def learned(resolved: Resolved, work: tuple[MeasuredWork, ...] = ()) -> Mapping[Work, Between]:
    """Seconds of all that an engine need not be played through for."""
    both = []
    for pace in Pace:
        model = model_of(resolved, pace, work)
        both.append(model.learning() | {Work.UPDATE_WEIGHTS: model.update_weights()})
    return {part: Between(both[0][part], both[1][part]) for part in both[0]}


def measured(work: Work, resolved: Resolved, share: float) -> MeasuredWork:
    """It took this share of the time that was planned."""
    kind = WorkKind.of(work, resolved.architecture, resolved.config)
    return MeasuredWork(kind, share * 3.0, 3.0, 3.0)


def test_what_took_as_long_as_planned_changes_nothing() -> None:
    resolved = resolved_of(RECIPE, *WITH_PASSES)
    as_planned = tuple(measured(work, resolved, 1.0) for work in MEASURED)
    assert learned(resolved, as_planned) == learned(resolved)


@pytest.mark.parametrize("work", MEASURED)
def test_what_took_half_as_long_halves_its_phase_and_nothing_else(work: Work) -> None:
    """Log-probs are a third of training. Of a weight update and an optimizer's step, gathering is not measured."""
    resolved = resolved_of(RECIPE, *WITH_PASSES)
    planned, found = learned(resolved), learned(resolved, (measured(work, resolved, 0.5),))
    halved = {work, Work.LOG_PROBS} if work is Work.TRAIN else {work}
    assert {part for part in planned if found[part] != planned[part]} == halved
    for pace in Pace:
        model = model_of(resolved, pace)
        gathering = {
            Work.UPDATE_WEIGHTS: model.send_weights(times=2) - model.send_weights(),
            Work.OPTIMIZER: model.gather_weights(),
        }
        assert all(seconds > 0 for seconds in gathering.values())
        stays = gathering.get(work, 0.0)
        for part in halved:
            assert found[part].at(pace) - stays == pytest.approx((planned[part].at(pace) - stays) / 2)


def test_a_measured_update_is_no_range_any_more() -> None:
    resolved = resolved_of(RECIPE)
    best, worst = (model_of(resolved, pace).send_weights() for pace in Pace)
    assert best < worst
    kind = WorkKind.of(Work.UPDATE_WEIGHTS, resolved.architecture, resolved.config)
    found = learned(resolved, (MeasuredWork(kind, 7.0, best, worst),))[Work.UPDATE_WEIGHTS]
    assert found.best == pytest.approx(found.worst)
    assert found.best - 7.0 == pytest.approx(model_of(resolved, Pace.BEST).send_weights(times=2) - best)


@pytest.mark.parametrize(
    ("recipe", "flags", "stays"),
    [
        (RECIPE, ON_THE_GPU, {Work.OPTIMIZER}),
        (RECIPE, ("--optimizer-offload-fraction", "0.5"), set()),
        ("glm4.7-flash-24gpu-async", (), {Work.OPTIMIZER, Work.UPDATE_WEIGHTS}),
        ("glm4.7-flash-16gpu", ("--recompute-method", "block", "--recompute-num-layers", "5"), {Work.OPTIMIZER}),
    ],
)
def test_another_way_stays_as_planned(recipe: str, flags: tuple[str, ...], stays: set[Work]) -> None:
    """One factor is good for all layouts and recomputation; an optimizer that is elsewhere (on the GPUs, where there
    are more of them), and weights that take another way, have speeds of their own."""
    base, other = resolved_of(RECIPE), resolved_of(recipe, *flags)
    planned, found = learned(other), learned(other, tuple(measured(work, base, 2.0) for work in MEASURED))
    assert {work for work in MEASURED if found[work] == planned[work]} == stays


def test_another_model_stays_as_planned() -> None:
    base = resolved_of(RECIPE)
    other = replace(base, architecture=base.architecture.model_copy(update={"hidden_size": 1024}))
    assert learned(base, tuple(measured(work, other, 2.0) for work in MEASURED)) == learned(base)


@given(gpus=st.sampled_from([1, 2, 8]), moe_layers=st.integers(1, 5), share=st.floats(0.3, 3.0))
def test_the_slice_itself_is_planned_as_it_was_measured(gpus: int, moe_layers: int, share: float) -> None:
    """Whatever of it the plan counts: exchanges, gradients between ranks, recomputation."""
    part = training.slice_of(resolved_of(RECIPE), gpus, moe_layers)
    machine = replace(H100, gpus=gpus)
    load = training.load_of(part, machine, LENGTHS)
    assert load.tokens == 8192
    planned = training.planned_seconds(part, machine, load, LENGTHS)
    kinds = (WorkKind.of(work, part.architecture, part.config) for work in (Work.TRAIN, Work.OPTIMIZER))
    work = tuple(
        MeasuredWork(kind, share * best, best, worst) for kind, (best, worst) in zip(kinds, planned, strict=True)
    )
    for pace in Pace:
        model = SpeedModel(GpuModel.of(part, replace(machine, work=work), on_gpu=True), LENGTHS, LENGTHS, pace)
        sequences = part.config.data_parallel_size * load.packs * load.sequences
        flops = sequences * training.sequence_cost(part.architecture)(float(load.length))
        layers = part.architecture.num_hidden_layers
        passes = model.passes(flops, sequences * load.length, layers) * model.factor(Work.TRAIN)
        assert passes == pytest.approx(work[0].seconds)
        assert model.learning()[Work.OPTIMIZER] == pytest.approx(work[1].seconds + model.gather_weights())


def test_it_is_written_read_and_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    path, resolved = tmp_path / "rates.json", resolved_of(RECIPE)
    rates = Rates(host_memory=3e11, work=tuple(measured(work, resolved, 0.7) for work in MEASURED))
    path.write_text(json.dumps(asdict(rates)))
    assert read_rates(path) == rates
    document = json.loads(path.read_text())
    for name, wrong in (("seconds", 0), ("planned_worst", -1), ("seconds", "long"), ("kind", None)):
        broken = json.loads(json.dumps(document))
        broken["work"][1][name] = wrong
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"work\.1\.{name}: .*: name the rates\.json"):
            read_rates(path)
    document["work"][0]["kind"]["work"] = "sleep"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"work\.0\.kind\.work: "):
        read_rates(path)
    path.write_text(json.dumps({"host_memory": 3e11, "matmul": 7e14, "gpus": 1}))
    assert read_rates(path).work == (), "of a smoke run"
