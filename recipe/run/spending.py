"""When a run has taken enough time and money, or shown what it was to show."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from recipe.config import MiscConfig
from recipe.run.comparison import gain
from recipe.run.metrics import Values
from recipe.run.status import Status
from recipe.system.errors import UserError
from recipe.system.shutdown import STOPPED_STATUS, Stopped

logger = logging.getLogger(__name__)

_STEPS = 5
"""The next step is taken to be as long as the longest of so many last ones, and saving as long as it ever was."""


class Budget:
    """What `--max-dollars` and `--max-hours` leave of a run whose time and cost `status` tells."""

    def __init__(self, misc: MiscConfig, status: Callable[[], Status], done: Iterable[Values] = ()) -> None:
        """`done` are the lines of the run's earlier commands."""
        self._misc, self._status = misc, status
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._save = 0.0
        for line in done:
            self.take(line)

    def take(self, line: Values) -> None:
        """A step is done, of which this is the line in metrics.jsonl."""
        if line["step"]:
            self._steps.append(line["seconds_step"] or 0.0)
        self._save = max(self._save, line.get("seconds_save") or 0.0)

    @property
    def next_s(self) -> float:
        """Seconds that the next step and a last checkpoint are expected to take; 0 while nothing is known."""
        return max(self._steps, default=0.0) + self._save

    def check_start(self) -> None:
        """Before anything is started: raises Stopped, and says it, if a step would bring the run over a limit. A run
        that has all of its steps takes none."""
        status = self._status()
        if status.step >= status.total_steps:
            return
        try:
            self.check()
        except Stopped as enough:
            print(
                f"{enough.why}: nothing is started; to go on, give another limit (exit status {STOPPED_STATUS})",
                file=sys.stderr,
                flush=True,
            )
            raise

    def check(self) -> None:
        """Before a step. Raises Stopped if it would bring the run over a limit."""
        status = self._status()
        hours, would_be = (status.seconds + self.next_s) / 3600, status.dollars + self.next_s * status.dollars_a_second
        dollars, longest = self._misc.max_dollars, self._misc.max_hours
        if dollars is not None and would_be > dollars:
            raise Stopped(
                f"${status.dollars:.2f} are spent and the next step would make it ${would_be:.2f}: "
                f"--max-dollars is {dollars:g}"
            )
        if longest is not None and hours > longest:
            raise Stopped(
                f"{status.seconds / 3600:.2f} hours are over and the next step would make it {hours:.2f}: --max-hours "
                f"is {longest:g}"
            )


def check_gain(misc: MiscConfig, run: Path, name: str, rollouts: int) -> None:
    """After an evaluation: raises Stopped if the 95% interval of the gain on the set `name` lies above `--target-gain`
    or, from `--target-gain-after` on, below it. Without that flag nothing is read; what cannot be compared is told and
    ends nothing."""
    target, after = misc.target_gain, misc.target_gain_after
    if target is None:
        return
    try:
        gained = gain(run, name)
    except UserError as error:
        logger.warning("--target-gain cannot be judged: %s", error)
        return
    if gained is None:
        return
    told = f"the gain on {name} is {gained.mean:+.3f}, 95% interval {gained.low:+.3f} to {gained.high:+.3f}"
    if gained.low >= target:
        raise Stopped(f"{told}: --target-gain {target:g} is reached")
    if after is not None and rollouts >= after and gained.high < target:
        raise Stopped(
            f"{told}: after {rollouts} rollouts (--target-gain-after) --target-gain {target:g} is not reached"
        )
