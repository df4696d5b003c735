"""Work of a step that was measured on a few layers, and what that makes of the planned seconds of all."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from recipe.config import Architecture, Config
from recipe.plan.ranges import Between, Pace, range_text
from recipe.plan.time_plan import Work

Way = Literal["the only one", "on the GPU", "in host memory", "from the trainer's memory", "broadcast"]


@dataclass(frozen=True)
class WorkKind:
    """What the speed of a part of a step hangs on, besides the model's depth, the settings and the GPUs."""

    work: Work
    hidden_size: PositiveInt
    experts: PositiveInt
    way: Way
    """Of those that have speeds of their own: where the optimizer's state lies, even if it is a part of it, and whether
    engines open the trainer's memory or are broadcast to."""

    @classmethod
    def of(cls, work: Work, architecture: Architecture, config: Config) -> Self:
        way: Way = "the only one"
        if work is Work.OPTIMIZER:
            way = "in host memory" if config.optimizer.optimizer_cpu_offload else "on the GPU"
        if work is Work.UPDATE_WEIGHTS:
            way = "from the trainer's memory" if config.cluster.colocate else "broadcast"
        return cls(work, architecture.hidden_size, architecture.n_routed_experts, way)


@dataclass(frozen=True)
class MeasuredWork:
    """How long something took, and how long the plan says that this very thing takes on that machine."""

    kind: WorkKind
    seconds: PositiveFloat
    planned_best: PositiveFloat
    planned_worst: PositiveFloat

    @property
    def planned(self) -> Between:
        """Seconds."""
        return Between(self.planned_best, self.planned_worst)

    def factor(self, pace: Pace) -> float:
        """Measured seconds over planned ones: what the plan's seconds of all such work are multiplied by, in whatever
        layout and with whatever recomputation. At both ends that gives what was measured. What goes over other links or
        memory in another layout is no part of either: an optimizer's step has its weights' gathering, and a weight
        update that of the trainer's, beside it."""
        return self.seconds / self.planned.at(pace)

    def __str__(self) -> str:
        return f"{self.kind.work}: {self.seconds:.3g} s, planned {range_text(self.planned)} s"
