"""Rollouts that are made while the trainer works, in the loop itself: what repeats, and what a strike costs."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import count

import pytest
from loop_support import Failed, Outcome, Strike, fail, kill, notice, run

from recipe.assembly import Run
from recipe.messages import StepReport
from recipe.rollout.collect import NothingToLearn
from recipe.rollout.filters import check_reward_nonzero_std
from recipe.run.conditions import Conditions

PARTIAL = "partial_rollout=true", "over_sampling_batch_size=4"
FIXED = ("async_rollout=true", "async_order=fixed")
FINISHED = ("async_rollout=true", "async_order=finished")
IN_FLIGHT = (*FINISHED, "update_weight_in_flight=keep")
STALENESS = "max_staleness=1", "max_staleness=3"


def test_with_no_staleness_it_is_the_synchronous_run() -> None:
    plain, without = run(), run("async_rollout=true", "max_staleness=0")
    assert without.trainer.weights == plain.trainer.weights
    assert without.lines == plain.lines
    assert without.points == plain.points


@pytest.mark.parametrize("staleness", STALENESS)
@pytest.mark.parametrize("keep", [None, check_reward_nonzero_std])
def test_in_fixed_order_it_repeats_whoever_finishes_first(staleness: str, keep) -> None:
    first, second = run(*FIXED, staleness, keep=keep), run(*FIXED, staleness, luck=5, keep=keep)
    assert second.trainer.weights == first.trainer.weights != run(keep=keep).trainer.weights
    assert second.lines == first.lines
    bound = int(staleness[-1])
    assert [first.lines[step]["staleness_max"] for step in range(1, 7)] == [min(step, bound) for step in range(6)]


@pytest.mark.parametrize("flags", [FIXED, FINISHED, IN_FLIGHT])
@pytest.mark.parametrize("staleness", STALENESS)
def test_generation_goes_on_while_the_trainer_works_and_no_token_is_too_old(
    flags: tuple[str, ...], staleness: str
) -> None:

    def until_the_second_rollout_is_there(points: list[str]) -> None:
        deadline = time.monotonic() + 120
        while points.count("generated") < 4:
            assert time.monotonic() < deadline, "nothing is generated while the trainer works"
            time.sleep(0.001)

    ended = run(*flags, staleness, in_training=until_the_second_rollout_is_there)
    oldest = [ended.lines[step]["staleness_max"] for step in range(1, 7)]
    assert oldest[0] == 0 < max(oldest) <= int(staleness[-1])
    assert_each_once(ended)
    assert ended.evaluated == ["0", "2", "4", "6"]


def test_weights_that_change_in_flight_are_told_token_by_token() -> None:
    """Where some come in mid response: in most runs, and by chance not in each."""
    runs = (run(*IN_FLIGHT, "max_staleness=2", luck=luck) for luck in range(30))
    assert any(line["staleness_mean"] % 1 for ended in runs for line in ended.lines.values() if line["step"])


@pytest.mark.parametrize("how", [kill, notice])
def test_in_fixed_order_a_run_that_was_struck_and_resumed_is_the_run_that_nothing_struck(how) -> None:
    """A notice may save while a rollout is under way whose weights are then gone: it is made again under newer ones."""
    flags = *FIXED, "max_staleness=2"
    whole = run(*flags, keep=check_reward_nonzero_std)
    for at in every_point(whole):
        ended = run(*flags, strike=Strike(at, how), keep=check_reward_nonzero_std)
        assert_each_once(ended)
        if how is kill:
            assert ended.trainer.weights == whole.trainer.weights, whole.points[at - 1]
            assert ended.lines == whole.lines, whole.points[at - 1]


@pytest.mark.parametrize("how", [kill, notice])
@pytest.mark.parametrize("flags", [(*FINISHED, "max_staleness=1"), (*IN_FLIGHT, "max_staleness=2")])
def test_struck_anywhere_and_resumed_every_sample_is_trained_once_and_none_is_lost(flags: tuple[str, ...], how) -> None:
    for at in every_point(run(*flags)):
        ended = run(*flags, strike=Strike(at, how), luck=at)
        assert_each_once(ended)
        assert all(line["staleness_max"] <= int(flags[-1][-1]) for line in ended.lines.values() if line["step"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((*FIXED, "max_staleness=2"), ("async_rollout=false",)),
        ((*FIXED, "max_staleness=2"), (*FIXED, "max_staleness=1")),
        ((*FIXED, "max_staleness=2"), (*FINISHED, "max_staleness=2")),
        ((*FINISHED, "max_staleness=2"), ("async_rollout=false",)),
        ((*FINISHED, "max_staleness=2"), (*FINISHED, "max_staleness=1")),
        ((*FINISHED, "max_staleness=2"), (*FIXED, "max_staleness=1")),
        (PARTIAL, (*FIXED, "max_staleness=1")),
        (PARTIAL, (*FINISHED, "max_staleness=1")),
    ],
)
def test_a_checkpoint_is_gone_on_from_in_another_order(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    ended = run(*before, strike=Strike(40, notice), then=after)
    assert_each_once(ended)
    assert len(ended.trainer.trained) == 6 * 4


def test_a_filter_ends_the_run_when_it_drops_all_groups_and_not_when_it_drops_most() -> None:
    """However many it drops while the trainer works and there is room for several rollouts."""

    def until_most_were_dropped(points: list[str]) -> None:
        deadline = time.monotonic() + 120
        while points.count("generated") < 60:
            assert time.monotonic() < deadline, "less is generated while the trainer works than there is room for"
            time.sleep(0.001)

    flags = *FINISHED, "max_staleness=4"
    ended = run(*flags, keep=lambda group: group.index % 8 == 7, in_training=until_most_were_dropped)
    assert_each_once(ended)
    with pytest.raises(NothingToLearn, match="dropped 22 of 22 groups"):
        run(*flags, keep=lambda group: group.index < 4)


def test_a_failure_of_what_is_made_ahead_is_the_runs_own() -> None:
    """Whether the trainer works meanwhile or not; and nothing is left running."""

    def fail() -> None:
        raise ZeroDivisionError("of generation")

    whole = run(*FINISHED, "max_staleness=1")
    struck = [at for at, point in zip(count(1), whole.points, strict=False) if point in ("generate", "generated")]
    for at in struck[::4]:
        with pytest.raises(ZeroDivisionError, match="of generation"):
            run(*FINISHED, "max_staleness=1", strike=Strike(at, fail))


@pytest.mark.parametrize(
    "flags", [(), (*FIXED, "max_staleness=2"), (*FINISHED, "max_staleness=1"), (*IN_FLIGHT, "max_staleness=2")]
)
def test_a_failure_that_is_not_the_trainers_ends_the_run_when_all_that_is_learned_is_saved(flags) -> None:
    """No step is taken twice by the run that goes on; and where trainer and engines wait for one another, it is the run
    that nothing ended."""
    whole = run(*flags)
    steps = [at for at, point in enumerate(whole.points, start=1) if point == "trained"]
    for at in [*every_point(whole)[::3], steps[3]]:
        strike = Strike(at, fail)
        ended = run(*flags, strike=strike, luck=at)
        assert ended.commands == 2
        assert_each_once(ended)
        if strike.points[at - 1] not in ("train", "trained", "save", "saved"):
            assert ended.points.count("trained") == 6, strike.points[at - 1]
        if not flags:
            assert ended.trainer.weights == whole.trainer.weights
            assert ended.lines == whole.lines


@pytest.mark.parametrize("how", [None, fail, notice])
def test_a_step_that_cannot_be_written_down_is_saved(
    how, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether that is what the run fails at, or it ends for something else before. Its line is missing, and what its
    checkpoint took in memory."""
    whole, failed, here = run(), [], Conditions.here
    full = iter((True,))

    def full_disk(step: int, course: Sequence[tuple[float, int]]) -> Conditions:
        if step == 3 and len(failed) < 2:
            failed.append(step)
            raise Failed("the disk is full")
        return here(step, course)

    def write_down(self: Run) -> None:
        if failed and next(full, False):
            raise Failed("the disk is full")

    monkeypatch.setattr(Conditions, "here", full_disk)
    monkeypatch.setattr(Run, "_record_host_memory", write_down)
    after_step_3 = [at for at, point in enumerate(whole.points, start=1) if point == "updated"][3]
    strike = Strike(after_step_3, how) if how is not None else Strike()
    ended = run(strike=strike)
    assert (ended.commands, len(failed)) == (2, 1)
    assert ended.points.count("trained") == 6
    assert ended.trainer.weights == whole.trainer.weights
    assert ended.lines == {step: line for step, line in whole.lines.items() if step != 3}
    assert ("save beside all others" in strike.points) == (how is not notice)
    said = capsys.readouterr().err
    assert "not saved" not in said
    assert ("saved; go on with --load" if how is notice else "what is done is saved; once") in said


def test_a_failure_in_the_midst_of_a_step_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are no rollout's."""
    counted = count(1)
    count_step = Run.count_step

    def diverge(self: Run, report: StepReport) -> None:
        count_step(self, report)
        if next(counted) == 4:
            fail()

    monkeypatch.setattr(Run, "count_step", diverge)
    ended = run()
    assert ended.commands == 2
    assert ended.points.count("trained") == 4 + 4
    assert_each_once(ended)


def every_point(whole: Outcome) -> list[int]:
    """Some of each kind of point after the first checkpoint, spread over the run, by number."""
    numbers: dict[str, list[int]] = {}
    for at, point in enumerate(whole.points, start=1):
        if "saved" in whole.points[:at]:
            numbers.setdefault(point, []).append(at)
    chosen = [at for of_kind in numbers.values() for at in of_kind[:: max(1, len(of_kind) // 2)]]
    assert len(chosen) >= 20
    return chosen


def assert_each_once(ended: Outcome) -> None:
    """Every sample that was drawn is trained once, or its prompt comes again."""
    samples = Counter(ended.trainer.trained)
    assert set(samples.values()) == {1}
    draws = {sample // 2 for sample in samples}
    dropped = sum(line["dropped_groups"] for line in ended.lines.values() if line["step"])
    assert len(ended.lines) == 7
    assert draws.isdisjoint(ended.unused)
    assert len(draws) + len(ended.unused) + dropped == ended.drawn
