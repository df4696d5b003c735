"""The order in which prompts are drawn."""

import hashlib
import random
from collections.abc import Sequence
from typing import TypedDict

from recipe.data.prompts import Prompt
from recipe.errors import UserError
from recipe.seeds import derive


class SourceState(TypedDict):
    drawn: int
    """Prompts drawn since the start of the run."""
    digest: str
    """Of the prompts, so that a resumed run notices other data."""


class PromptSource:
    """Draws batches for ever, epoch after epoch, each epoch in its own order if `shuffle`.

    Invariants: in every epoch each prompt is drawn once, whatever the batch size; a batch that reaches over the end of
    an epoch is filled from the next one; the order depends on `seed` and the number of prompts alone, so a source
    that is loaded with a state goes on exactly as the one that gave it.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, *, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._drawn = 0
        self._order = self._epoch_order(0)

    def next_batch(self) -> list[Prompt]:
        return [self._next() for _ in range(self._batch_size)]

    def state_dict(self) -> SourceState:
        return {"drawn": self._drawn, "digest": self._digest()}

    def load_state_dict(self, state: SourceState) -> None:
        """Goes to where the state was taken. Raises UserError if that was among other prompts."""
        if state["digest"] != self._digest():
            raise UserError("the prompts of --prompt-data are not those that the checkpoint was written with")
        self._drawn = state["drawn"]
        self._order = self._epoch_order(self._drawn // len(self._prompts))

    def _next(self) -> Prompt:
        epoch, place = divmod(self._drawn, len(self._prompts))
        if place == 0:
            self._order = self._epoch_order(epoch)
        self._drawn += 1
        return self._prompts[self._order[place]]

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(derive(self._seed, "data", epoch)).shuffle(order)
        return order

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(f"{prompt.text}\0{prompt.label}\0{prompt.response}\0".encode())
        return digest.hexdigest()
