"""The cheapest settings: engines and trainers are tried apart, and the best of both together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from recipe.config import Architecture, Resolved
from recipe.config.checks import problems_of
from recipe.config.loading import Setting, Settings, build_config, trace_sources
from recipe.config.schema import GROUPS
from recipe.plan import constants
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.plan import Plan, make_plan
from recipe.plan.tune.space import Values, at_once, engines, splits, trainers
from recipe.system.errors import UserError

TUNED_SOURCE = "tuned"
KEPT = 6
"""Engines, and trainers, of which all pairs are tried."""


@dataclass(frozen=True)
class Choice:
    """Settings, and the plan with them."""

    values: Values
    """What differs from the given settings."""
    plan: Plan

    @property
    def dollars(self) -> float:
        """Of the whole run, in the middle of their range."""
        assert self.plan.time is not None
        return self.plan.time.dollars.middle


@dataclass(frozen=True)
class Tuner:
    """Tries settings on top of a recipe's, on machines of one kind."""

    settings: Settings
    architecture: Architecture
    machine: Machine
    lengths: Lengths | None

    def given(self) -> Choice:
        """The recipe as it is. Raises UserError if it is not one that can be planned."""
        choice = self.choice({})
        if choice is None or choice.plan.resolved.config.cluster.device == "cpu":
            raise UserError("only a run on GPUs, whose settings hold together, can be tuned: see what make plan says")
        return choice

    def choice(self, values: Values) -> Choice | None:
        """The settings with these on top; None if a rule refuses them."""
        changed = {key: value for key, value in values.items() if self._differs(key, value)}
        settings = {**self.settings, **{key: Setting(value, TUNED_SOURCE) for key, value in changed.items()}}
        try:
            config = build_config(settings)
            if problems_of(config, self.architecture):
                return None
            resolved = Resolved(config, self.architecture, trace_sources(settings), ())
            return Choice(changed, make_plan(resolved, self.machine, on_gpu=True, lengths=self.lengths))
        except UserError:
            return None

    def _differs(self, key: str, value: object) -> bool:
        """From what is set, or else is the default."""
        if (given := self.settings.get(key)) is not None:
            return given.value != value
        group, name, *argument = key.split(".", 2)
        return value is not False if argument else getattr(GROUPS[group].model_fields[name], "default", None) != value

    def best(self, count: int) -> list[Choice]:
        """The cheapest ones that fit with a margin, the cheapest first, each with another kind of engine."""
        pairs = [pair for split in splits(self.given().plan.resolved.config) for pair in self._pairs(split)]
        return self._cheapest([{}, *pairs], count)

    def _pairs(self, split: Values) -> Iterator[Values]:
        """The best engines with the best trainers, on the GPUs that the two have."""
        given = self.choice(split)
        if given is None:
            return
        config = given.plan.resolved.config
        of_engines = self._cheapest(({**split, **one} for one in engines(config, self.architecture)), KEPT)
        tried = ({**split, **one} for one in trainers(config, self.architecture))
        of_trainers = sorted(self._that_fit(tried), key=_by_cost)[:KEPT]
        for one, other in product(of_engines, of_trainers):
            yield {**split, **one.values, **other.values}

    def quick(self) -> Choice | None:
        """The cheapest of a few: the given engines with other numbers of sequences at once, and saves beside training.
        None if the given settings are."""
        found = sorted(self._that_fit([{}, *at_once(self.given().plan.resolved.config)]), key=_by_cost)
        return found[0] if found and found[0].values else None

    def _cheapest(self, tried: Iterable[Values], count: int) -> list[Choice]:
        """One of each kind of engine, the cheapest first; of those that cost the same, the one with fewer changes."""
        kinds: dict[object, Choice] = {}
        for one in sorted(self._that_fit(tried), key=_by_cost):
            kinds.setdefault(_kind(one), one)
        return list(kinds.values())[:count]

    def _that_fit(self, tried: Iterable[Values]) -> Iterator[Choice]:
        for values in tried:
            choice = self.choice(values)
            if choice is not None and choice.plan.fits and has_margin(choice.plan):
                yield choice


def _by_cost(choice: Choice) -> tuple[int, int]:
    """Dollars, and of those that cost the same the number of changes."""
    return round(choice.dollars), len(choice.values)


def _kind(choice: Choice) -> tuple[object, ...]:
    """Its GPUs, how they share sequences, and drafts."""
    settings = choice.plan.resolved.config.sglang
    names = ("dp_size", "speculative_algorithm")
    return settings.rollout_num_gpus_per_engine, settings.speculative_max_batch, *map(settings.args.get, names)


def has_margin(plan: Plan) -> bool:
    """Whether enough is left of GPUs and machines for what the plan only assumes."""
    phases: Sequence = [*(plan.gpu.phases if plan.gpu is not None else ()), *plan.host]
    return all(one.margin >= constants.TUNED_MARGIN * one.capacity for one in phases)
