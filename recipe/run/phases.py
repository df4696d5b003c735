"""What the loop is doing, and how long each of it takes in a step."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What the loop is doing, as the metrics `seconds_...` describe it (`recipe.run.metrics`)."""

    ROLLOUT = "rollout"
    LOG_PROBS = "log_probs"
    TRAIN = "train"
    UPDATE_WEIGHTS = "update_weights"
    EVAL = "eval"
    SAVE = "save"


@dataclass(frozen=True)
class StepSeconds:
    """Wall time of a step in seconds: the whole, and what its phases took of it."""

    step: float
    phases: Mapping[Phase, float]

    @property
    def training(self) -> float:
        """The step without evaluating and saving: what rates are given over."""
        return self.step - self.phases.get(Phase.EVAL, 0.0) - self.phases.get(Phase.SAVE, 0.0)


class PhaseClock:
    """Measures a step's phases. `on_enter` is told each phase as it begins (for the progress display)."""

    def __init__(self, on_enter: Callable[[Phase], None]) -> None:
        self._on_enter = on_enter
        self._phases: dict[Phase, float] = {}
        self._step_began = time.perf_counter()

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        self._on_enter(phase)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - began

    def lap(self) -> StepSeconds:
        """The times since the last lap; begins the next one.

        A step's line is written before its checkpoint is saved, so a save counts in the lap of the step after it.
        """
        now = time.perf_counter()
        seconds = StepSeconds(now - self._step_began, self._phases)
        self._step_began, self._phases = now, {}
        return seconds
