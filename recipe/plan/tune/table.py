"""What was found beside what was given."""

from collections.abc import Iterator, Sequence

from recipe.config.flags import spell
from recipe.plan.hardware import GB, GIB
from recipe.plan.ranges import Between, range_text
from recipe.plan.time_plan import Side, TimePlan, Work
from recipe.plan.tune.search import Choice

WORTH_TELLING = 0.2
"""Of the money, that a change must save."""


def table(given: Choice, best: Sequence[Choice]) -> str:
    """A column for each, and below it what changes."""
    columns = [("given", given), *((str(number), one) for number, one in enumerate(best, start=1))]
    rows = list(_rows([one for _, one in columns]))
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns) + 1)]
    names = ("", *(name for name, _ in columns))
    widths = [max(width, len(name)) for width, name in zip(widths, names, strict=True)]
    lines = [_line(names, widths), *(_line(row, widths) for row in rows), ""]
    lines += [f"{number}: {changes(one)}" for number, one in enumerate(best, start=1)]
    return "\n".join([*lines, "", verdict(given, best)])


def changes(choice: Choice) -> str:
    """The flags of what differs from the given settings."""
    return " ".join(spell(key, value) for key, value in choice.values.items()) or "as given"


def verdict(given: Choice, best: Sequence[Choice]) -> str:
    """What the cheapest saves, in a sentence."""
    if not best:
        return "Nothing that was tried fits with a margin: see what make plan says of the recipe."
    saved = 1 - best[0].dollars / given.dollars
    if not given.plan.fits:
        return "The given settings do not fit; 1 does."
    if saved < 0.01:
        return "Nothing that was tried is cheaper than the given settings by the plan."
    return f"By the plan 1 costs {saved:.0%} less than the given settings, and changes no setting of learning."


def hint(given: Choice, best: Choice | None) -> Iterator[str]:
    """A line, where the given settings leave more than a fifth of the money on the table."""
    saved = 0.0 if best is None else 1 - best.dollars / given.dollars
    if best is not None and saved > WORTH_TELLING:
        flags = changes(best)
        yield f"{flags} would cost {saved:.0%} less by the plan, and changes no setting of learning; see make tune."


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "   ".join([f"  {first}", *others]).rstrip()


def _rows(choices: Sequence[Choice]) -> Iterator[list[str]]:
    times = [_time(choice) for choice in choices]
    yield ["seconds of a step", *(range_text(time.step_s) for time in times)]
    for work in Work:
        if any(work in time.seconds for time in times):
            yield [f"  {work}", *(range_text(time.seconds.get(work, Between.exactly(0.0))) for time in times)]
    for side in Side:
        if all(time.sides for time in times):
            yield [f"  {side} busy", *(range_text(time.sides[side].seconds) for time in times)]
    yield ["dollars a step", *(range_text(time.dollars_a_step) for time in times)]
    if any(time.evaluations for time in times):
        yield ["seconds of an evaluation", *(range_text(time.evaluation) for time in times)]
    yield [f"hours of {times[0].rollouts:,} steps", *(range_text(time.hours) for time in times)]
    yield ["dollars", *(range_text(time.dollars) for time in times)]
    yield ["GiB left of a GPU", *(f"{_least(choice, gpu=True) / GIB:.1f}" for choice in choices)]
    yield ["GB left of a machine", *(f"{_least(choice, gpu=False) / GB:.0f}" for choice in choices)]


def _time(choice: Choice) -> TimePlan:
    assert choice.plan.time is not None
    return choice.plan.time


def _least(choice: Choice, gpu: bool) -> int:
    plan = choice.plan
    assert plan.gpu is not None
    return min(one.margin for one in (plan.gpu.phases if gpu else plan.host))
