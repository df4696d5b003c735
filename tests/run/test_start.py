"""The times of a start: told as they are known, each once."""

from recipe.messages import RankPart
from recipe.run.start import StartClock, StartMoment, StartPart


def test_a_start_is_told_by_part_and_moment() -> None:
    lines: list[str] = []
    clock = StartClock(lines.append)
    clock.command_is_read()
    clock.begin(StartPart.RANKS)
    with clock.measure(StartPart.DATA):
        pass
    clock.end(StartPart.RANKS, {RankPart.IMPORTS: 2.0, RankPart.WEIGHTS: 0.25})
    clock.reach(StartMoment.WEIGHTS)
    assert list(clock.seconds) == ["command", "data", "ranks", "ranks_imports", "ranks_weights", "to_first_weights"]
    assert clock.seconds["ranks"] >= clock.seconds["data"] >= 0
    assert clock.seconds["to_first_weights"] >= clock.seconds["command"] > 0
    told = [line.split("  ", 1) for line in lines]
    assert all(when.startswith("start ") for when, _ in told)
    assert [what.split(" ")[0] for _, what in told] == ["command", "data", "ranks", "the"]
    assert told[2][1].endswith("(imports 2.0s weights 0.2s)")


def test_what_comes_again_does_not_count() -> None:
    """Weights are sent and answers come in every step."""
    lines: list[str] = []
    clock = StartClock(lines.append)
    clock.begin(StartPart.FIRST_WEIGHTS)
    clock.end(StartPart.FIRST_WEIGHTS)
    clock.reach(StartMoment.ANSWER)
    before = dict(clock.seconds)
    clock.end(StartPart.FIRST_WEIGHTS)
    clock.reach(StartMoment.ANSWER)
    assert clock.seconds == before
    assert len(lines) == 2


def test_a_part_that_fails_is_not_done() -> None:
    clock = StartClock(lambda _: None)
    try:
        with clock.measure(StartPart.DATA):
            raise ValueError
    except ValueError:
        pass
    assert clock.seconds == {}
