"""Time and money of a step and of a run, each between its best and its worst."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from recipe.plan.ranges import Between


class Work(StrEnum):
    """Parts of a step's time."""

    ROLLOUT = "rollout"
    LOG_PROBS = "log-probs"
    TRAIN = "train"
    OPTIMIZER = "optimizer"
    UPDATE_WEIGHTS = "weight update"
    SAVE = "save"


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

    @property
    def step_s(self) -> Between:
        """Evaluations are not in it."""
        return sum(self.seconds.values(), Between.exactly(0.0))

    @property
    def run_s(self) -> Between:
        """All steps and evaluations."""
        return self.step_s * self.rollouts + self.evaluation * self.evaluations

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
