"""What the terminal shows while a run goes: one live display, or a plain line a step where there is no terminal."""

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from recipe.run.metrics import StepMetrics, Values, shown
from recipe.run.phases import Phase, StepSeconds

_PACE_STEPS = 20
"""The time to go is judged by this many last steps."""


class Pace:
    """How fast steps follow one another, evaluations and checkpoints included."""

    def __init__(self, steps_to_go: int) -> None:
        self._to_go = steps_to_go
        self._moments = deque([time.monotonic()], maxlen=_PACE_STEPS + 1)

    def step(self) -> None:
        """A step is done."""
        self._to_go -= 1
        self._moments.append(time.monotonic())

    def seconds_to_go(self) -> float | None:
        """Expected time to the end; None before the first step."""
        intervals = len(self._moments) - 1
        return self._to_go * (self._moments[-1] - self._moments[0]) / intervals if intervals else None


class Progress:
    """Use as a context manager around the run."""

    def __init__(self, console: Console, total_steps: int, steps_done: int) -> None:
        self.console = console
        self._total = total_steps
        self._step = steps_done
        self._pace = Pace(total_steps - steps_done)

    def enter(self, phase: Phase) -> None:
        """`phase` begins."""

    def step(self, metrics: StepMetrics) -> None:
        """A step (or, as step 0, the evaluation before the first) is done."""
        if metrics.step > 0:
            self._step = metrics.step
            self._pace.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends the display."""

    def _position(self) -> str:
        return f"step {self._step}/{self._total}"

    def _time_to_go(self) -> str:
        seconds = self._pace.seconds_to_go()
        return "" if seconds is None else f"{_clock(seconds)} to go"


class PlainProgress(Progress):
    """A line a step."""

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        parts = [self._position(), *shown(metrics.as_line()), *_evals(metrics.evals), _times(metrics.seconds)]
        self.console.print("  ".join([*parts, self._time_to_go()]).rstrip(), soft_wrap=True, highlight=False)


class LiveProgress(Progress):
    """One display that stays at the bottom of the terminal; whatever else is printed scrolls by above it."""

    def __init__(self, console: Console, total_steps: int, steps_done: int) -> None:
        super().__init__(console, total_steps, steps_done)
        self._phase: Phase | None = None
        self._phase_began = time.monotonic()
        self._last: StepMetrics | None = None
        self._last_evals: tuple[int, list[str]] | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def enter(self, phase: Phase) -> None:
        self._phase, self._phase_began = phase, time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        self._last = metrics
        if metrics.evals:
            self._last_evals = metrics.step, _evals(metrics.evals)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._phase = None
        self._live.stop()

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._total, completed=self._step, width=30)
        head.add_row(Text(self._position(), style="bold"), bar, self._time_to_go(), self._now())
        lines: list[RenderableType] = [head]
        if self._last is not None:
            lines.append(Text("  ".join(shown(self._last.as_line())), style="green"))
            lines.append(Text(_times(self._last.seconds), style="dim"))
        if self._last_evals is not None:
            step, evals = self._last_evals
            lines.append(Text(f"{'  '.join(evals)}  (after step {step})", style="cyan"))
        return Group(*lines)

    def _now(self) -> str:
        return "" if self._phase is None else f"{self._phase} {time.monotonic() - self._phase_began:.0f}s"


def open_progress(total_steps: int, steps_done: int, console: Console | None = None) -> Progress:
    """The display for a run of `total_steps`, of which `steps_done` were done before. Default console: stdout."""
    console = console or Console()
    return (LiveProgress if console.is_terminal else PlainProgress)(console, total_steps, steps_done)


def _evals(evals: Mapping[str, Values]) -> list[str]:
    form = "{name} {reward:.3f} [{ci95_low:.3f}, {ci95_high:.3f}]"
    return [form.format(name=name, **values) for name, values in evals.items()]


def _times(seconds: StepSeconds) -> str:
    phases = " ".join(f"{phase} {value:.2f}s" for phase, value in seconds.phases.items())
    return f"{seconds.step:.2f}s ({phases})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
