"""The order in which prompts are drawn."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from recipe.data.prompts import Prompt
from recipe.system.errors import UserError
from recipe.system.seeds import derive


class SourceState(TypedDict):
    drawn: int
    """Prompts drawn since the start of the run, those that were put back included."""
    put_back: list[int]
    """The draws that were put back and are made again first."""
    digest: str
    """Digest of the prompts, so that a resumed run notices other data."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt and the number of its draw, which is unique in the run."""

    number: int
    prompt: Prompt


class Draws(ABC):
    """Prompts for ever, a draw after the other.

    Invariants: the prompt of a draw depends on what the source was made from and the draw's own number alone, so a
    source that is loaded with a state goes on exactly as the one that gave it. Draws that were put back come again
    before new ones, the lowest number first.
    """

    def __init__(self) -> None:
        self._drawn = 0
        self._put_back: list[int] = []

    @abstractmethod
    def prompt_of(self, number: int) -> Prompt:
        """The prompt of a draw."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of the prompts, and of what else tells which draw each is."""

    def draw(self, count: int) -> list[Draw]:
        """The next `count` draws."""
        again, self._put_back = self._put_back[:count], self._put_back[count:]
        first, self._drawn = self._drawn, self._drawn + count - len(again)
        return [Draw(number, self.prompt_of(number)) for number in (*again, *range(first, self._drawn))]

    def put_back(self, numbers: Iterable[int]) -> None:
        """Undoes the draws of these numbers, whose prompts were not used."""
        self._put_back = sorted((*self._put_back, *numbers))

    def state_dict(self, unfinished: Iterable[int] = ()) -> SourceState:
        """The state, in which the draws that are `unfinished` are put back."""
        return {
            "drawn": self._drawn,
            "put_back": sorted((*self._put_back, *unfinished)),
            "digest": self.digest(),
        }

    def load_state_dict(self, state: SourceState) -> None:
        """Goes to where the state was taken. Raises UserError if that was among other prompts."""
        if state["digest"] != self.digest():
            raise UserError(
                "the prompts of --prompt-data, or their weights, are not those that the checkpoint was written with"
            )
        self._drawn, self._put_back = state["drawn"], list(state["put_back"])


class PromptSource(Draws):
    """Draws prompts epoch after epoch, each epoch in its own order if `shuffle`.

    Invariants: in every epoch each prompt is drawn once, whatever the sizes of the batches; a batch that reaches over
    the end of an epoch is filled from the next one; the prompt of a draw depends on `seed`, the number of prompts and
    the draw's own number alone.
    """

    def __init__(self, prompts: Sequence[Prompt], *, shuffle: bool, seed: int) -> None:
        super().__init__()
        self._prompts = prompts
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._order = self._epoch_order(0)

    def prompt_of(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._epoch_order(epoch)
        return self._prompts[self._order[place]]

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(derive(self._seed, "data", epoch)).shuffle(order)
        return order

    def digest(self) -> str:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(f"{prompt.text}\0{prompt.label}\0{prompt.response}\0".encode())
            if prompt.rm_type:
                digest.update(f"{prompt.rm_type}\0".encode())
        return digest.hexdigest()
