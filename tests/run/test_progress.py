"""The terminal: one live display, plain lines elsewhere, the same facts in both."""

import io
import re

import pytest
from made_up import step_metrics
from rich.console import Console

from recipe.run.phases import Phase, PhaseClock
from recipe.run.progress import open_progress


def console(stream: io.StringIO, terminal: bool) -> Console:
    return Console(file=stream, force_terminal=terminal, width=120, color_system=None)


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with open_progress(total_steps=10, steps_done=0, console=console(stream, terminal=False)) as progress:
        progress.step(step_metrics(0, heldout=0.4))
        for step in (1, 2):
            progress.enter(Phase.ROLLOUT)
            progress.step(step_metrics(step))
    before, first, second = stream.getvalue().splitlines()
    assert before.startswith("step 0/10  heldout 0.400 [0.300, 0.500]")
    assert first.startswith("step 1/10  reward 0.510  length 6.0  loss 0.3333  grad norm 0.200  entropy 0.700")
    assert re.search(r"2\.00s \(rollout 1\.00s eval 0\.50s\)  0:0\d to go$", second)
    assert "\x1b" not in stream.getvalue()


def test_a_long_line_is_one_line():
    stream = io.StringIO()
    progress = open_progress(10, 0, Console(file=stream, force_terminal=False, width=40))
    progress.step(step_metrics(1, heldout=0.4, other=0.5))
    assert stream.getvalue().count("\n") == 1


def test_the_live_display_shows_step_reward_phase_and_time_to_go():
    stream = io.StringIO()
    with open_progress(total_steps=10, steps_done=4, console=console(stream, terminal=True)) as progress:
        progress.enter(Phase.TRAIN)
        progress.step(step_metrics(5, heldout=0.9))
        progress.step(step_metrics(6))
    shown = stream.getvalue()
    assert "\x1b[" in shown  # redrawn in place
    assert "step 6/10" in shown
    assert "reward 0.560" in shown
    assert "heldout 0.900" in shown
    assert "(after step 5)" in shown
    assert "to go" in shown


def test_times_by_phase_add_up_and_begin_anew():
    entered: list[Phase] = []
    clock = PhaseClock(entered.append)
    with clock.measure(Phase.ROLLOUT):
        pass
    with pytest.raises(RuntimeError), clock.measure(Phase.TRAIN):
        raise RuntimeError
    lap = clock.lap()
    assert entered == [Phase.ROLLOUT, Phase.TRAIN]
    assert set(lap.phases) == {Phase.ROLLOUT, Phase.TRAIN}
    assert lap.step >= sum(lap.phases.values()) >= 0
    assert clock.lap().phases == {}
