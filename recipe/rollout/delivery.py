"""What the trainer tells of a weight update."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of a weight update."""

    failed: Mapping[str, str] = field(default_factory=dict)
    """Engines that died or hung over it, by address, and how it showed."""
    incomplete: tuple[str, ...] = ()
    """Engines that are well but have not got everything, since another one failed in a broadcast."""

    def __add__(self, other: "Delivery") -> "Delivery":
        """To different engines."""
        return Delivery({**self.failed, **other.failed}, (*self.incomplete, *other.incomplete))
