"""The loop in which trainer and engines wait for one another: what a strike at any point of it costs."""

import pytest
from loop_support import Strike, kill, notice, run
from test_async_loop import PARTIAL, assert_each_once, every_point

from recipe.rollout.filters import check_reward_nonzero_std


@pytest.mark.parametrize("how", [kill, notice])
def test_a_run_that_was_struck_and_resumed_is_the_run_that_nothing_struck(how) -> None:
    """Its groups that teach nothing are replaced."""
    whole = run(keep=check_reward_nonzero_std)
    assert sum(line.get("dropped_groups", 0) for line in whole.lines.values()) > 0
    for at in every_point(whole):
        ended = run(strike=Strike(at, how), luck=at, keep=check_reward_nonzero_std)
        assert_each_once(ended)
        assert ended.trainer.weights == whole.trainer.weights, whole.points[at - 1]
        assert ended.lines == whole.lines, whole.points[at - 1]


@pytest.mark.parametrize("how", [kill, notice])
def test_aborted_groups_wait_in_checkpoints_and_go_on(how) -> None:
    whole = run(*PARTIAL)
    assert sum(line.get("stale_token_share", 0) for line in whole.lines.values()) > 0, "no group has waited"
    for at in every_point(whole):
        assert_each_once(run(*PARTIAL, strike=Strike(at, how), luck=at))
