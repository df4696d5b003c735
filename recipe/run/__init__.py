"""The run directory and the terminal: what a run leaves behind and what it shows while it goes."""

from recipe.run.directory import RunDirectory, SampleRecord
from recipe.run.metrics import EvalMetrics, Phase, PhaseClock, RolloutMetrics, StepMetrics, StepSeconds, TrainMetrics
from recipe.run.progress import Progress, open_progress
from recipe.run.start import StartClock, StartMoment, StartPart

__all__ = [
    "EvalMetrics",
    "Phase",
    "PhaseClock",
    "Progress",
    "RolloutMetrics",
    "RunDirectory",
    "SampleRecord",
    "StartClock",
    "StartMoment",
    "StartPart",
    "StepMetrics",
    "StepSeconds",
    "TrainMetrics",
    "open_progress",
]
