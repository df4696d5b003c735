"""What the trainer tells of a weight update."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from recipe.system.errors import UserError


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What became of a weight update."""

    failed: Mapping[int, str] = field(default_factory=dict)
    """Engines that died or hung over it, by number, and how it showed."""
    incomplete: tuple[int, ...] = ()
    """Numbers of engines that are well but have not got everything, since another one failed in a broadcast."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Engines that are well and did not take the weights, or hold others afterwards, by number, with what is wrong.
    Told and not raised: the trainer's ranks have done their part."""

    bytes_per_second: float | None = field(default=None, compare=False)
    """Speed of the whole model's weights to each GPU of the slowest of the engines; None: they were not sent from
    here."""
    paused_s: float | None = field(default=None, compare=False)
    """Seconds from when the engines were to stand still until all was sent; None: they were not told to."""

    def __add__(self, other: "UpdateResult") -> "UpdateResult":
        """To different engines."""
        rates = [one.bytes_per_second for one in (self, other) if one.bytes_per_second is not None]
        pauses = [one.paused_s for one in (self, other) if one.paused_s is not None]
        return UpdateResult(
            {**self.failed, **other.failed},
            (*self.incomplete, *other.incomplete),
            {**self.refused, **other.refused},
            min(rates, default=None),
            max(pauses, default=None),
        )

    def check_taken(self) -> None:
        """Raises UserError if engines that are well do not take the weights: they would refuse them again."""
        if self.refused:
            raise UserError("; ".join(self.refused.values()))
