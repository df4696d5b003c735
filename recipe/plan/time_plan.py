"""Time and money of a step and of a run, each between its best and its worst."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from recipe.plan.ranges import Between


class Side(StrEnum):
    """Whose GPUs they are, where trainer and engines share none."""

    TRAINER = "trainer"
    ENGINES = "engines"


class Work(StrEnum):
    """Parts of a step's time."""

    ROLLOUT = "rollout"
    LOG_PROBS = "log-probs"
    TRAIN = "train"
    OPTIMIZER = "optimizer"
    UPDATE_WEIGHTS = "weight update"
    SAVE = "save"


OF_ENGINES = Work.ROLLOUT, Work.UPDATE_WEIGHTS
"""What keeps engines busy. The trainer waits for a rollout, and is busy with all the rest."""


@dataclass(frozen=True)
class SidePlan:
    """One side of a step."""

    gpus: int
    seconds: Between
    """In which it is busy."""
    idle: Between
    """Share of the step in which it is not."""


@dataclass(frozen=True)
class TimePlan:
    """A step (one rollout and what is learned from it) and the run."""

    seconds: Mapping[Work, Between]
    """Seconds of a step by kind of work; saves are spread over the steps between them."""
    tail: Between
    """Of the rollout's seconds, with less than a quarter of the sequences at once."""
    evaluation: Between
    """Seconds of one evaluation."""
    evaluations: int
    """In the whole run."""
    response_tokens: float
    """Generated a step."""
    tokens: float
    """Trained on a step, prompts included."""
    gpus: int
    rollouts: int
    price: float
    """Dollars a GPU and hour."""
    engine_gpus: int = 0
    """Of the engines' own; 0: they share the trainer's, or there are none."""
    alone: Between | None = None
    """Seconds of a rollout while the trainer waits for it, where rollouts are generated beside training."""

    @property
    def step_s(self) -> Between:
        """Evaluations are not in it. Where both sides work at once, the slower one's: the weight update, in which both
        take part, is in each of them."""
        if self.alone is None:
            return sum(self.seconds.values(), Between.exactly(0.0))
        return self._busy(Side.TRAINER).larger(self._busy(Side.ENGINES))

    @property
    def first_step_s(self) -> Between:
        """The first rollout has no step before it that is learned from meanwhile."""
        if self.alone is None:
            return self.step_s
        return self.alone + self._busy(Side.TRAINER)

    @property
    def run_s(self) -> Between:
        """All steps and evaluations."""
        return self.first_step_s + self.step_s * (self.rollouts - 1) + self.evaluation * self.evaluations

    @property
    def sides(self) -> Mapping[Side, SidePlan]:
        """Both; none where trainer and engines share their GPUs."""
        if not self.engine_gpus:
            return {}
        gpus = {Side.TRAINER: self.gpus - self.engine_gpus, Side.ENGINES: self.engine_gpus}
        return {side: SidePlan(gpus[side], self._busy(side), self._idle(side)) for side in Side}

    def _busy(self, side: Side) -> Between:
        works = OF_ENGINES if side is Side.ENGINES else [work for work in Work if work is not Work.ROLLOUT]
        return sum((self.seconds[work] for work in works if work in self.seconds), Between.exactly(0.0))

    def _idle(self, side: Side) -> Between:
        busy, step = self._busy(side), self.step_s
        return Between(1 - busy.best / step.best, 1 - busy.worst / step.worst)

    @property
    def hours(self) -> Between:
        return self.run_s * (1 / 3600)

    @property
    def dollars(self) -> Between:
        return self.hours * (self.gpus * self.price)

    @property
    def dollars_a_step(self) -> Between:
        """Evaluations are not in it."""
        return self.step_s * (self.gpus * self.price / 3600)

    def tokens_per_s(self, work: Work) -> Between:
        """Tokens that a phase works on, by its seconds."""
        tokens = self.response_tokens if work is Work.ROLLOUT else self.tokens
        found = self.seconds[work]
        return Between(tokens / found.best, tokens / found.worst)
