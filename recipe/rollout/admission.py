"""Which units of work are started, trained and dropped while the trainer works. Pure: no clock, no engine, no order of
events that it does not accept.

A unit is a group of samples, of which a rollout takes `size`, or a whole rollout, of which it takes one.
"""

from collections.abc import Iterable


class Admission:
    """The books of units that are under way or ready to be trained.

    The engines hold the weights of `version`; rollout number `next_rollout` is trained next, from the weights of that
    number. A unit that was started under version v may be trained in rollout v + `max_staleness` at the latest, which
    is its last one.

    Invariants:
    - No unit is trained later than in its last rollout, so none of its tokens is older than `max_staleness` versions.
    - For every rollout r from the next one on, the units whose last rollout is at most r fit into the rollouts up to r.
    - A unit is started once, and then dropped or trained once: none is dropped for its age. Which of those that are
      ready are trained depends on the order in which they started and finished, never on when.
    - If nothing is under way and the engines hold the newest weights, a unit may be started or a rollout be trained,
      until all rollouts are: whoever waits for what is under way waits for something that comes.
    - No more units are under way or ready than the rollouts that are left can take.
    """

    def __init__(self, size: int, max_staleness: int, *, rollouts: int, done: int = 0) -> None:
        """Of `rollouts` in all, `done` are trained, and the engines hold the weights after them."""
        self._size, self._max_staleness, self._rollouts = size, max_staleness, rollouts
        self._under_way: dict[int, int] = {}
        self._ready: dict[int, int] = {}
        self.version = self.next_rollout = done

    @property
    def under_way(self) -> tuple[int, ...]:
        """The units that are neither ready nor dropped, in the order in which they started."""
        return tuple(self._under_way)

    @property
    def ready(self) -> tuple[int, ...]:
        """The units that may be trained, in the order in which they finished."""
        return tuple(self._ready)

    def has_room(self, version: int | None = None) -> bool:
        """Whether one more unit may be started, under the engines' version, or taken over that was started under
        `version`."""
        last = self._last_rollout(self.version if version is None else version)
        with_it = [*self._last_rollouts(), last]
        left = (self._rollouts - self.next_rollout) * self._size
        return len(with_it) <= left and self._fit(with_it, self.next_rollout)

    def start(self, unit: int, version: int | None = None) -> None:
        """A unit is started under the engines' version, or taken over from a run that started it under `version`."""
        assert self.has_room(version), f"there is no room for unit {unit}"
        assert unit not in self._under_way, f"unit {unit} is under way"
        assert unit not in self._ready, f"unit {unit} is ready"
        self._under_way[unit] = self.version if version is None else version

    def finish(self, unit: int, *, passes: bool) -> None:
        """A unit is finished, and may be trained or is dropped."""
        version = self._under_way.pop(unit)
        if passes:
            self._ready[unit] = version

    def batch(self) -> list[int] | None:
        """The units of the next rollout, those that started under the oldest weights first and of them the first to
        finish; None while there are too few, or older ones have to be waited for."""
        oldest_first = sorted(self._ready, key=lambda unit: self._ready[unit])
        chosen = oldest_first[: self._size]
        others = [unit for unit in (*self._under_way, *self._ready) if unit not in chosen]
        fits = self._fit(map(self._last_rollout_of, others), self.next_rollout + 1)
        return chosen if len(chosen) == self._size and fits else None

    def take(self) -> list[int]:
        """Takes the units of the next rollout, which is trained now."""
        chosen = self.batch()
        assert chosen is not None, f"rollout {self.next_rollout} is not ready"
        for unit in chosen:
            del self._ready[unit]
        self.next_rollout += 1
        return chosen

    def advance(self, version: int) -> None:
        """The engines hold the weights of `version`."""
        assert self.version <= version <= self.next_rollout, f"there is no version {version} yet"
        self.version = version

    def _fit(self, last_rollouts: Iterable[int], first: int) -> bool:
        """Whether units with these last rollouts fit into the rollouts from number `first` on."""
        return all(
            last >= first and number <= (last - first + 1) * self._size
            for number, last in enumerate(sorted(last_rollouts), start=1)
        )

    def _last_rollouts(self) -> list[int]:
        return [*map(self._last_rollout_of, (*self._under_way, *self._ready))]

    def _last_rollout_of(self, unit: int) -> int:
        return self._last_rollout(self._under_way[unit] if unit in self._under_way else self._ready[unit])

    def _last_rollout(self, version: int) -> int:
        return version + self._max_staleness
