"""Draws from several prompt files, of each its share."""

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from recipe.data.prompts import Prompt
from recipe.data.source import Draws, PromptSource
from recipe.system.seeds import derive


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and its share of the draws where there are several."""

    name: str
    prompts: Sequence[Prompt]
    weight: float | None = None
    """None: each file counts by its number of prompts."""


def open_draws(files: Sequence[PromptFile], *, shuffle: bool, seed: int) -> Draws:
    """The draws of a run from its prompt files."""
    if len(files) == 1:
        return PromptSource(files[0].prompts, shuffle=shuffle, seed=seed)
    return PromptMixture(files, shuffle=shuffle, seed=seed)


class PromptMixture(Draws):
    """Draws from several files by their weights, of each file epoch after epoch.

    Invariants: after any number of draws each file has had its share of them, rounded down or up; the draws of one file
    are those of a `PromptSource` of it alone, whose seed is named by the file, so another file beside it, or other
    weights, change when its prompts come and not in which order. The prompts tell the name of their file.
    """

    def __init__(self, files: Sequence[PromptFile], *, shuffle: bool, seed: int) -> None:
        super().__init__()
        self._names = [file.name for file in files]
        self._weights = whole_weights(files)
        self._turns = Turns(self._weights)
        self._sources = [
            PromptSource(
                [replace(prompt, source=file.name) for prompt in file.prompts],
                shuffle=shuffle,
                seed=derive(seed, "data", file.name),
            )
            for file in files
        ]

    def prompt_of(self, number: int) -> Prompt:
        file, own_number = self._turns.of_draw(number)
        return self._sources[file].prompt_of(own_number)

    def digest(self) -> str:
        digests = [source.digest() for source in self._sources]
        told = list(zip(self._names, self._weights, digests, strict=True))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def whole_weights(files: Sequence[PromptFile]) -> list[int]:
    """The weights of files as the smallest whole numbers of their ratio: 0.7 and 0.3, as they are written, are 7
    and 3."""
    shares = [Fraction(len(file.prompts)) if file.weight is None else Fraction(str(file.weight)) for file in files]
    unit = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * unit) for share in shares]
    return [weight // math.gcd(*weights) for weight in weights]


class Turns:
    """Whose turn a draw is, among files of whole weights w with the sum W.

    The quota method (Balinski and Young, "The Quota Method of Apportionment", American Mathematical Monthly 82, 1975):
    a draw goes to the file whose next one is due first, file f's n-th at n / w(f), among those that have had less than
    their share. Invariants: of the first n draws file f has n w(f) / W, rounded down or up. So after W draws all
    have exactly their shares, and it begins anew: only W turns are ever worked out, and those when they are asked for.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = weights
        self._sum = sum(weights)
        self._intervals = [math.lcm(*weights) // weight for weight in weights]
        self._counts = [0] * len(weights)
        self._files, self._numbers = array("q"), array("q")

    def of_draw(self, number: int) -> tuple[int, int]:
        """The place of the file that a draw is from, and the number of the draw among that file's own."""
        cycle, turn = divmod(number, self._sum)
        while turn >= len(self._files):
            self._add()
        file = self._files[turn]
        return file, cycle * self._weights[file] + self._numbers[turn]

    def _add(self) -> None:
        draws = len(self._files) + 1
        behind = [f for f, weight in enumerate(self._weights) if self._counts[f] * self._sum < draws * weight]
        file = min(behind, key=lambda f: (self._counts[f] + 1) * self._intervals[f])
        self._files.append(file)
        self._numbers.append(self._counts[file])
        self._counts[file] += 1
