"""What a start is doing and how long that takes: shown as it happens, and kept for summary.json."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

import psutil

from recipe.messages import RankPart


class StartPart(StrEnum):
    """What is begun and waited for; ranks, engines and data at the same time."""

    COMMAND = "command"
    """From the process's beginning: imports, the configuration, the checks of this machine."""
    RAY = "ray"
    DATA = "data"
    """Prompts and evaluation sets are read and checked."""
    RANKS = "ranks"
    """Until every training rank holds its weights."""
    ENGINES = "engines"
    """Until every engine is healthy."""
    FIRST_WEIGHTS = "first_weights"
    """The policy is sent to the engines."""


class StartMoment(StrEnum):
    """What a start leads to, in seconds since the command began."""

    WEIGHTS = "to_first_weights"
    """The engines hold the policy, and generate from now on."""
    ANSWER = "to_first_answer"
    """The first response is complete."""


_TOLD = {StartMoment.WEIGHTS: "the engines generate", StartMoment.ANSWER: "first answer"}


class StartClock:
    """Measures a start. `show` is given a line for every part that is done."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        """By part and moment; what is known so far."""
        self.on_begin: Callable[[StartPart], None] = lambda _: None
        """Is told each part as it begins."""
        self._show = show
        self._under_way: dict[StartPart, float] = {}
        self._began = psutil.Process().create_time()

    def command_is_read(self) -> None:
        """All that comes before a run is opened is done."""
        self._take_down(StartPart.COMMAND, self._since_the_command, {})

    def begin(self, part: StartPart) -> None:
        """The part begins."""
        self._under_way[part] = time.monotonic()
        self.on_begin(part)

    def end(self, part: StartPart, within: Mapping[RankPart, float] | None = None) -> None:
        """The part is done; `within` are the seconds of what it consists of. To be called again does nothing."""
        if (began := self._under_way.pop(part, None)) is not None:
            self._take_down(part, time.monotonic() - began, within or {})

    @contextmanager
    def measure(self, part: StartPart) -> Iterator[None]:
        """The part is the block, if that ends well."""
        self.begin(part)
        yield
        self.end(part)

    def reach(self, moment: StartMoment) -> None:
        """The moment has come; only the first time counts."""
        if moment not in self.seconds:
            self.seconds[moment] = self._since_the_command
            self._show(f"start {self.seconds[moment]:.1f}s  {_TOLD[moment]}")

    def _take_down(self, part: StartPart, seconds: float, within: Mapping[RankPart, float]) -> None:
        self.seconds |= {part: seconds} | {f"{part}_{name}": value for name, value in within.items()}
        parts = " ".join(f"{name} {value:.1f}s" for name, value in within.items())
        what = f"{part.replace('_', ' ')} {seconds:.1f}s" + (f" ({parts})" if parts else "")
        self._show(f"start {self._since_the_command:.1f}s  {what}")

    @property
    def _since_the_command(self) -> float:
        return time.time() - self._began
