"""Rollouts that are generated while the trainer learns from earlier ones, and how long an engine takes for each then.

With --max-staleness S, rollout r begins as soon as the weights are there that have learned from rollout r - S - 1. In
the steady state a step takes P seconds, in which an engine begins a rollout and ends one. From its begin until its own
weights are there rollout r has S + 1 steps, and needs its time L on the engines and then the trainer's, T:

    L + T <= (S + 1) P

More rollouts at once make each of them slower and the engines' tokens faster: L falls and P rises with the gap, the
tokens that an engine makes of each response between the begins of two rollouts. The smallest gap that satisfies it is
the engines' pace. At the largest that is of use nothing of a rollout is left when the next begins. That groups that end
early may be learned from earlier (--async-order finished) is not counted: with S = 1 it changes nothing.

The pause of an update is on both sides, and stands apart; what an engine reads again after it is added to the step.

R: rollouts that are played; N: samples of one on this engine.
"""

from dataclasses import dataclass

import numpy as np

from recipe.plan.playout import Course, Played, TokenTime, Turn

PRECISION = 64
"""Steps into which the largest gap is divided."""


def rollouts_to_play(staleness: int) -> int:
    """So many that each in the later half runs beside as many as those that follow would."""
    return 6 + 2 * staleness


@dataclass(frozen=True)
class Paced:
    """What rollouts that come at one pace take."""

    step: Played
    """The time in which the engine makes the tokens of one."""
    latency_s: float
    """From the coming of one to its end; infinity if none ends."""
    held: float
    """Tokens that are under way, prompts included."""


@dataclass(frozen=True)
class Pipeline:
    """One engine, and the rollouts that it makes."""

    samples: np.ndarray
    """[R, N] tokens of responses, in the order in which they come."""
    places: int
    """Groups of the engine's GPUs that hold different sequences."""
    slots: int
    """Sequences at once of such a group."""
    prompt: float
    """Tokens before a response."""
    token_time: TokenTime
    reading_s: float
    """In which the prompts of one rollout are read."""
    again_s: float = 0.0
    """In which a token that is under way at an update is read once more."""

    @property
    def largest_gap(self) -> int:
        """Tokens after which the longest of the rollouts, alone, is over."""
        return max(int(self._ends(self._turns(rollout[None], 0), 1)[0]) for rollout in self.samples)

    def steady(self, training_s: float, staleness: int) -> Played:
        """A step at the engine's own pace, beside a trainer that needs so many seconds to learn from a rollout."""
        largest = self.largest_gap
        low, high = 0, PRECISION
        while high - low > 1:
            middle = (low + high) // 2
            found = self.paced(-(-largest * middle // PRECISION))
            if found.latency_s + training_s <= (staleness + 1) * found.step.seconds:
                high = middle
            else:
                low = middle
        found = self.paced(-(-largest * high // PRECISION))
        return Played(found.step.seconds + self.again_s * found.held, found.step.tail_s)

    def paced(self, gap: int) -> Paced:
        """If a rollout comes every `gap` tokens, by the later half of them."""
        rollouts = len(self.samples)
        turns = self._turns(self.samples, gap)
        course = Course.of(turns, self.prompt, self.token_time)
        begins, ends = np.arange(rollouts + 1) * gap, self._ends(turns, rollouts)
        half = rollouts // 2
        found = course.between(int(begins[half]), int(begins[-1]))
        share = float(self.samples.sum()) / rollouts / found.made
        step = Played(share * found.played.seconds + self.reading_s, share * found.played.tail_s)
        whole = (ends <= begins[-1]) & (np.arange(rollouts) >= half - 1)
        took = (course.at(ends) - course.at(begins[:-1]))[whole]
        latency = float(took.mean()) if whole.any() else np.inf
        return Paced(step, latency + self.reading_s, found.held)

    def _turns(self, samples: np.ndarray, gap: int) -> list[Turn]:
        """Of each of the places that has a sample, if one of these rollouts comes every `gap` tokens."""
        come = np.arange(len(samples)) * gap
        of_places = (samples[:, place :: self.places] for place in range(min(self.places, samples.shape[1])))
        return [Turn.of(lengths.ravel(), self.slots, np.repeat(come, lengths.shape[1])) for lengths in of_places]

    def _ends(self, turns: list[Turn], rollouts: int) -> np.ndarray:
        """[R] when the last response of each rollout ends, on the clock of tokens."""
        return np.max([turn.ends.reshape(rollouts, -1).max(axis=1) for turn in turns], axis=0)
