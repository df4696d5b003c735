"""The parts of a run: what it reads, the trainer, the engines, and the books."""

from recipe.assembly.inputs import Data
from recipe.assembly.opening import open_run
from recipe.assembly.rollout_engines import RolloutEngines
from recipe.assembly.run import Run

__all__ = ["Data", "RolloutEngines", "Run", "open_run"]
