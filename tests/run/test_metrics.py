"""One table of metrics: what stands in it can be measured, and what is measured stands in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jsonschema
import pytest
import torch
from made_up import step_metrics

from recipe.experience import train_metrics
from recipe.grpo import loss
from recipe.messages import StepReport
from recipe.run import metrics
from recipe.run.metrics import METRICS, Metric, Reduction, StepMetrics, eval_metric, over_steps, schema, shown
from recipe.run.phases import Phase, StepSeconds
from recipe.system.errors import UserError

NEW = "advantage_size"


def validate(line: object) -> None:
    jsonschema.validate(line, schema(), cls=jsonschema.Draft202012Validator)


def step_on(advantages: Sequence[float], *microbatches: slice) -> StepReport:
    """What an optimizer step on such tokens reports, all of them of one weight, cut into microbatches."""
    tensor = torch.tensor(advantages)
    weights = torch.full_like(tensor, 1 / len(advantages))
    parts = [
        loss.policy_loss(
            loss.PolicyLossInputs(-torch.ones_like(tensor[cut]), tensor[cut], weights[cut]), loss.PolicyLossConfig()
        ).metrics
        for cut in microbatches
    ]
    return StepReport(sum(parts[1:], start=parts[0]).values(), skipped=False)


@pytest.mark.parametrize(("name", "metric"), METRICS.items())
def test_every_entry_says_what_it_is(name: str, metric: Metric) -> None:
    assert metric.unit
    assert metric.sentence[0].isupper() or metric.sentence[0] in "`|k"
    assert metric.sentence.endswith(".")
    assert (metric.unit == "s") == name.startswith("seconds_")
    assert metric.unit.endswith("/s") == name.endswith("_per_second")
    assert (metric.unit == "share") <= (metric.reduction in (Reduction.MEAN, None))


def test_a_line_is_as_the_schema_says() -> None:
    whole = step_metrics(1, heldout=0.5, other_set=0.25)
    whole = replace(whole, values={**whole.values, "draft_accept_rate_12": 0.5, "kl": math.nan, "tis_weight": None})
    line = whole.as_line()
    validate(line)
    assert line["kl"] is None
    assert "tis_weight" not in line
    validate(step_metrics(0, heldout=0.5).as_line())
    for wrong in (line | {"reward": "high"}, line | {"rewards": 1.0}, line | {"draft_accept_rate_0": 1.0}, {"step": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_every_phase_has_its_seconds() -> None:
    phases = dict.fromkeys(Phase, 1.0)
    line = StepMetrics(step=1, seconds=StepSeconds(9.0, phases)).as_line()
    measured_elsewhere = {"seconds_forward_backward", "seconds_optimizer", "seconds_paused", "seconds_engines_idle"}
    assert line.keys() == {"step"} | {name for name in METRICS if name.startswith("seconds_")} - measured_elsewhere


def test_what_stands_in_no_table_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step_metrics(1)
    refused: dict[str, Callable[[], object]] = {
        "rewrad": lambda: replace(whole, values={"rewrad": 1.0}).as_line(),
        "clip_fraction": lambda: over_steps([{"loss": 1.0, "clip_fraction": 0.5}]),
        "eval/NAME_luck": lambda: replace(whole, evals={"heldout": {"reward": 1.0, "luck": 1.0}}).as_line(),
        "ratio": lambda: step_on([1.0], slice(0, 1)),
    }
    without = {name: metric for name, metric in METRICS.items() if name != "ratio"}
    monkeypatch.setattr("recipe.run.metrics.METRICS", without)  # in the table itself it would come back last
    for name, compute in refused.items():
        with pytest.raises(UserError, match=rf"the metric '{name}' is computed, but is in no table: add it to METRICS"):
            compute()


def test_a_loss_is_not_reduced_as_only_steps_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "ratio", replace(METRICS["ratio"], reduction=Reduction.LAST))
    with pytest.raises(UserError, match=r"'ratio' .* by mean, maximum, sum: METRICS in .* says last"):
        step_on([1.0], slice(0, 1))


@pytest.mark.parametrize(
    ("reduction", "expected"), [(Reduction.MEAN, (10 / 5 + 5 / 3) / 2), (Reduction.MAXIMUM, 4.0), (Reduction.SUM, 15.0)]
)
def test_a_new_metric_is_one_entry_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reduction: Reduction, expected: float
) -> None:
    """From the loss of two optimizer steps, in microbatches, to everything that shows it."""
    surrogate = loss._surrogate

    def with_one_line_more(log_probs, old, advantages, sequence, config):
        token_loss, measured = surrogate(log_probs, old, advantages, sequence, config)
        measured[NEW] = advantages.abs()
        return token_loss, measured

    monkeypatch.setitem(METRICS, NEW, Metric("1", reduction, "Size of the advantage.", "size {:.1f}"))
    monkeypatch.setattr(loss, "_surrogate", with_one_line_more)
    reports = [
        step_on([-1.0, 2.0, -3.0, 4.0, 0.0], slice(0, 2), slice(2, 5)),
        step_on([1.0, -1.0, 3.0], slice(0, 3), slice(3, 3)),
    ]
    line = replace(step_metrics(1), values=train_metrics([], reports, 0)).as_line()
    assert line[NEW] == pytest.approx(expected)
    validate(line)
    assert shown(line)[-1] == f"size {line[NEW]:.1f}"
    for form in ("--schema", "--markdown"):
        monkeypatch.setattr("sys.argv", ["metrics", form])
        metrics.main()
        assert "Size of the advantage." in capsys.readouterr().out


def test_a_skipped_step_and_one_that_did_not_measure_count_as_before() -> None:
    steps = [{"loss": 1.0, "entropy": 3.0, "lr": 1e-3}, {"loss": math.nan, "lr": 2e-3}, {"loss": 2.0, "lr": 3e-3}]
    found = over_steps(steps)
    assert math.isnan(found["loss"])
    assert (found["entropy"], found["lr"]) == (3.0, 3e-3)
    assert over_steps([]) == {}


def test_an_evaluation_set_may_have_any_name() -> None:
    assert eval_metric("NAME_samples") == "eval/NAME_samples"
    assert eval_metric("aime_2025", "maj_at_n") == "eval/aime_2025_maj_at_n"
