"""Which groups of a rollout are kept. Pure: it is told of groups by their numbers, in the order of their prompts."""


class Selection:
    """Keeps `target` of the groups that pass the filter: the first to finish or, `in_order`, the first by number.

    Invariants: more groups are wanted only once it is certain that those submitted do not suffice, so how many are
    submitted in all depends on the verdicts and the sizes of the refills alone, never on the order in which groups
    finish; `in_order`, neither does which groups are kept, dropped and unused. Every submitted group is one of these.
    """

    def __init__(self, target: int, *, in_order: bool) -> None:
        self._target = target
        self._in_order = in_order
        self._verdicts: list[bool | None] = []
        self._passed: list[int] = []

    def submit(self) -> None:
        """Takes up one more group."""
        self._verdicts.append(None)

    def decide(self, number: int, passes: bool) -> None:
        """Group `number` is finished, and passes the filter or not."""
        self._verdicts[number] = passes
        if passes:
            self._passed.append(number)

    @property
    def needs_more(self) -> bool:
        """Whether the submitted groups cannot suffice."""
        return len(self._verdicts) - self._verdicts.count(False) < self._target

    @property
    def is_complete(self) -> bool:
        """Whether it is known which groups are kept."""
        return len(self._certain()) >= self._target

    @property
    def kept(self) -> list[int]:
        """The kept groups, ascending."""
        return sorted(self._certain()[: self._target])

    @property
    def dropped(self) -> list[int]:
        """The groups that the filter dropped; `in_order`, those before the last that is kept."""
        return [number for number, passes in enumerate(self._verdicts[: self._end]) if passes is False]

    @property
    def unused(self) -> list[int]:
        """The groups that are neither kept nor dropped, whatever has become of them."""
        others = {*self.kept, *self.dropped}
        return [number for number in range(len(self._verdicts)) if number not in others]

    def _certain(self) -> list[int]:
        """The groups that are kept, if there are enough of them, in the order in which that became certain."""
        if not self._in_order:
            return self._passed
        undecided = next((n for n, passes in enumerate(self._verdicts) if passes is None), len(self._verdicts))
        return [number for number in range(undecided) if self._verdicts[number]]

    @property
    def _end(self) -> int:
        complete_in_order = self._in_order and self.is_complete
        return self.kept[-1] + 1 if complete_in_order else len(self._verdicts)
