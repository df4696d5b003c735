"""Limits of time and money: a run never goes on beyond them, and never ends long before."""

from dataclasses import replace

import pytest

from recipe.config import MiscConfig
from recipe.run.spending import Budget
from recipe.run.status import RunState, Status
from recipe.system.shutdown import STOPPED_STATUS, Stopped

HOUR = 3600.0
STATUS = Status(
    state=RunState.RUNNING,
    doing="rollout",
    since=0.0,
    step=0,
    total_steps=100,
    began=1000.0,
    beat=1000.0,
    seconds=0.0,
    dollars=0.0,
    gpus=8,
    price=2.5,
    process=("here", 1, 0),
)
"""Of a run that costs $20 an hour."""


def steps_until_it_ends(misc: MiscConfig, seconds: list[float], earlier_s: float = 0.0) -> tuple[int, float, str]:
    """How many steps a run takes, at what time, and why it ends."""
    elapsed = 0.0

    def status() -> Status:
        seconds = earlier_s + elapsed
        return replace(STATUS, seconds=seconds, dollars=seconds * STATUS.dollars_a_second)

    budget = Budget(misc, status)
    for done, step in enumerate(seconds):
        try:
            budget.check()
        except Stopped as stop:
            return done, elapsed + earlier_s, stop.why
        elapsed += step
        budget.take({"step": done + 1, "seconds_step": step, "seconds_save": 0.0})
    return len(seconds), elapsed, ""


@pytest.mark.parametrize("limits", [{"max_dollars": 20.01}, {"max_hours": 1.0}])
@pytest.mark.parametrize("step", [100.0, 700.0, 3600.0])
def test_it_ends_within_one_step_of_the_limit_and_not_beyond(limits: dict, step: float) -> None:
    done, elapsed, why = steps_until_it_ends(MiscConfig(**limits), [step] * 100)
    assert elapsed <= HOUR
    assert elapsed > HOUR - step
    assert done == HOUR // step
    assert f"--{next(iter(limits)).replace('_', '-')}" in why


def test_what_earlier_commands_took_counts() -> None:
    _, total, why = steps_until_it_ends(MiscConfig(max_dollars=20.01), [100.0] * 100, earlier_s=3000.0)
    assert HOUR - 100 < total <= HOUR
    assert "--max-dollars is 20.01" in why


def test_a_long_step_among_the_last_and_the_save_are_expected() -> None:
    budget = Budget(MiscConfig(max_hours=1.0), lambda: STATUS)
    for number, (step, save) in enumerate([(100, 50), (400, 0), *[(100, 0)] * 4], start=1):
        budget.take({"step": number, "seconds_step": float(step), "seconds_save": float(save)})
    assert budget.next_s == 450
    budget.take({"step": 7, "seconds_step": 100.0})
    assert budget.next_s == 150


def test_what_earlier_commands_steps_took_is_expected_of_the_next() -> None:
    step = {"step": 1, "seconds_step": 400.0, "seconds_save": 100.0}
    budget = Budget(MiscConfig(max_hours=1.0), lambda: STATUS, [{"step": 0, "seconds_step": 900.0}, step])
    assert budget.next_s == 500
    with pytest.raises(Stopped):
        Budget(MiscConfig(max_hours=0.1), lambda: STATUS, [step]).check()


def test_without_a_limit_it_goes_on() -> None:
    assert steps_until_it_ends(MiscConfig(), [HOUR] * 1000)[0] == 1000


def test_the_status_is_its_own() -> None:
    with pytest.raises(Stopped) as stopped:
        Budget(MiscConfig(max_hours=1e-9), lambda: replace(STATUS, seconds=HOUR)).check()
    assert stopped.value.code == STOPPED_STATUS


def test_a_command_beyond_its_limit_starts_nothing_unless_no_step_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def budget(step: int) -> Budget:
        return Budget(MiscConfig(max_hours=0.5), lambda: replace(STATUS, seconds=HOUR, step=step))

    with pytest.raises(Stopped):
        budget(STATUS.total_steps - 1).check_start()
    assert "--max-hours is 0.5: nothing is started" in capsys.readouterr().err
    budget(STATUS.total_steps).check_start()
    assert capsys.readouterr().err == ""
