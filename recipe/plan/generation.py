"""Seconds that a run's engines generate, by playing its rollouts and evaluations through."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np

from recipe.config import Resolved
from recipe.plan import constants
from recipe.plan.decoding import Decoding
from recipe.plan.engine import EngineEstimate, rollouts_at_once
from recipe.plan.flops import active_parameters
from recipe.plan.lengths import Lengths
from recipe.plan.memory import GpuModel, longest_sample
from recipe.plan.overlap import Pipeline, rollouts_to_play
from recipe.plan.playout import Played, Turn, in_order, play
from recipe.plan.ranges import Pace

ROLLOUTS = 8
"""Played one after the other where each leaves something for the next: the later half is like those that follow."""


@dataclass(frozen=True)
class Generation:
    """All engines of a run at one pace."""

    resolved: Resolved
    memory: GpuModel
    lengths: Lengths
    eval_lengths: Lengths
    pace: Pace

    @cached_property
    def engine(self) -> EngineEstimate:
        return EngineEstimate(self.resolved.architecture, self.resolved.config, longest_sample(self.resolved))

    @cached_property
    def decoding(self) -> Decoding:
        machine = self.memory.machine
        return Decoding(self.engine, machine.gpu, self.pace, machine.decoding)

    def rollout(self) -> Played:
        """One rollout; of those that are drawn beyond what is needed, one in the midst of others."""
        settings = self.resolved.config.rollout
        if settings.draw_size > settings.rollout_batch_size:
            return self._over_sampled()
        count = settings.rollout_batch_size * settings.n_samples_per_prompt
        groups = self._groups(self.lengths, count, settings.n_samples_per_prompt)
        return self._slowest(self._turns(groups, self.lengths), groups)

    def beside_training(self, training_s: float) -> Played:
        """One of rollouts that are generated beside a trainer which needs so many seconds to learn from each. Where
        nothing is under way when weights come, one begins when the one before it has ended."""
        config = self.resolved.config
        if rollouts_at_once(config) == 1:
            return self.rollout()
        staleness = config.rollout.staleness
        return self._pipeline(staleness).steady(training_s, staleness)

    def _pipeline(self, staleness: int) -> Pipeline:
        """The engine that gets most tokens, and so many rollouts that the later ones see what all following would."""
        config, played = self.resolved.config, rollouts_to_play(staleness)
        size, each, engines = config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt, config.num_engines
        groups = self._groups(self.lengths, played * size * each, each)
        rollouts = [groups[first : first + size] for first in range(0, played * size, size)]
        of_engines = (
            np.array([np.concatenate(one[number::engines]) for one in rollouts]) for number in range(min(engines, size))
        )
        reads_again = config.rollout.update_weight_in_flight == "recompute"
        return Pipeline(
            samples=max(of_engines, key=np.sum),
            places=self.engine.attention_groups,
            slots=self._slots(self.lengths),
            prompt=constants.MEAN_PROMPT,
            token_time=self.decoding.token,
            reading_s=self.reading_s(constants.MEAN_PROMPT * size),
            again_s=engines * self.reading_s(1) * reads_again,
        )

    def evaluation(self) -> Played:
        """One evaluation: all sets at once."""
        settings = self.resolved.config.eval
        samples = settings.n_samples_per_eval_prompt
        prompts = sum(prompts_of(path) for _, path in settings.eval_prompt_data)
        groups = self._groups(self.eval_lengths, prompts * samples, samples)
        return self._slowest(self._turns(groups, self.eval_lengths), groups)

    def _over_sampled(self) -> Played:
        """The mean of rollouts that each end when enough groups are whole. Where rollouts are partial, the others that
        have begun go on in the next, and those that are whole already wait for it."""
        settings = self.resolved.config.rollout
        each, drawn = settings.n_samples_per_prompt, settings.draw_size
        fresh = self._groups(self.lengths, ROLLOUTS * drawn * each, each)
        waiting: list[np.ndarray] = []
        found: list[Played] = []
        for _ in range(ROLLOUTS):
            groups, waiting = waiting[:drawn], waiting[drawn:]
            new = drawn - len(groups)
            groups, fresh = groups + fresh[:new], fresh[new:]
            turns = self._turns(groups, self.lengths)
            edges = _by_group([in_order(of_engine) for of_engine in turns], each)
            order = sorted(range(drawn), key=lambda number: int(edges[number][1].max()))
            moment = int(edges[order[settings.rollout_batch_size - 1]][1].max())
            found.append(self._slowest([[turn.until(moment) for turn in of_engine] for of_engine in turns], groups))
            if settings.partial_rollout:
                others = (edges[number] for number in order[settings.rollout_batch_size :])
                waiting += [_left(starts, ends, moment) for starts, ends in others if starts.min() < moment]
        usual = found[ROLLOUTS // 2 :]
        return Played(fmean(played.seconds for played in usual), fmean(played.tail_s for played in usual))

    def _groups(self, lengths: Lengths, count: int, each: int) -> list[np.ndarray]:
        drawn = lengths.draw(count, self.resolved.config.misc.seed)
        return [drawn[start : start + each] for start in range(0, count, each)]

    def _turns(self, groups: Sequence[np.ndarray], lengths: Lengths) -> list[list[Turn]]:
        """[engines][groups of GPUs]: groups of samples go to the engines in turn, and each engine's samples to its
        groups of GPUs."""
        engines, places = self.resolved.config.num_engines, self.engine.attention_groups
        slots = self._slots(lengths)
        found = []
        for number in range(engines):
            samples = np.concatenate([*groups[number::engines], np.zeros(0, dtype=np.int64)])
            found.append([Turn.of(samples[place::places], slots) for place in range(places)])
        return found

    def _slots(self, lengths: Lengths) -> int:
        """Sequences at once of a group of GPUs."""
        memory = self.memory.engine_memory
        assert memory is not None
        return self.decoding.slots(memory.tokens, constants.MEAN_PROMPT + lengths.mean)

    def reading_s(self, tokens: float) -> float:
        """Seconds in which all engines together read so many tokens of prompts."""
        layout = self.engine.layout
        flops = 2 * active_parameters(self.resolved.architecture) * tokens
        gpus = self.resolved.config.num_engines * layout.tp * layout.pp
        return flops / (gpus * self.memory.machine.gpu.flops * constants.TRAINING_SHARE)

    def _slowest(self, turns: Sequence[Sequence[Turn]], groups: Sequence[np.ndarray]) -> Played:
        """The engine that needs longest, reading the prompts included."""
        played = max((play(of_engine, constants.MEAN_PROMPT, self.decoding.token) for of_engine in turns), key=_seconds)
        reading = self.reading_s(constants.MEAN_PROMPT * len(groups))  # each once for its samples
        return Played(played.seconds + reading, played.tail_s)


def _by_group(edges: Sequence[tuple[np.ndarray, np.ndarray]], each: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Starts and ends of the sequences of each group, in the order in which the groups went to the engines in turn."""
    found = []
    for number in range(sum(len(ends) for _, ends in edges) // each):
        starts, ends = edges[number % len(edges)]
        first = number // len(edges) * each
        found.append((starts[first : first + each], ends[first : first + each]))
    return found


def _left(starts: np.ndarray, ends: np.ndarray, moment: int) -> np.ndarray:
    """Tokens that the sequences of a group have before them at that moment."""
    return np.maximum(0, ends - np.maximum(moment, starts))


def _seconds(played: Played) -> float:
    return played.seconds


def prompts_of(path: Path) -> int:
    """Lines of an evaluation set, where it is there."""
    try:
        with path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)
    except OSError:
        return constants.EVAL_PROMPTS
