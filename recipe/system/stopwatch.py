"""Times of what is done one after the other."""

import time


class Stopwatch:
    """Seconds by name; what has the same name adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """What was done since the last lap counts nowhere."""
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What was done since the last lap, or restart, was `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
