"""Weights for an engine whose processes open the memory of several training ranks.

A handle of a GPU's memory is opened on that GPU alone, and one of shared memory on its machine: every process of an
engine gets the handles of the rank that sits where it does. The rank beside the first process speaks to the engine: it
gathers the payloads of all, in the order of SGLang's tensor-parallel ranks, of which each reads the one with its own
number, and tells the others when a bucket is taken and may go.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from recipe.weight_sync.tensor import Bucket


@dataclass(frozen=True, slots=True)
class Recipient:
    """An engine that takes an update."""

    engine: int
    url: str
    sources: tuple[int, ...]
    """The training rank that hands each of SGLang's tensor-parallel ranks its weights; the first one speaks to the
    engine."""


class Relay:
    """One rank's side of an update, for all engines that it hands weights to."""

    def __init__(
        self, store: dist.Store, update: int, rank: int, recipients: Sequence[Recipient], timeout: timedelta
    ) -> None:
        """`store`: of all ranks; `update`: its number, the same on all; `timeout`: after which another rank is given
        up."""
        self._store, self._rank, self._timeout = dist.PrefixStore(f"weights/{update}", store), rank, timeout
        mine = [one for one in recipients if rank in one.sources]
        self._led = [one for one in mine if one.sources[0] == rank]
        self._followed = [one for one in mine if one.sources[0] != rank]
        self._bucket = 0

    @property
    def engines(self) -> dict[int, str]:
        """The addresses of the engines that this rank speaks to, by number."""
        return {one.engine: one.url for one in self._led}

    @property
    def is_open(self) -> bool:
        """Whether an engine is left that takes this rank's weights: one that fails is left out."""
        return bool(self._led or self._followed)

    def exchange(self, bucket: Bucket) -> dict[int, list[str]]:
        """Hands over the payloads of the next bucket. Returns, by number, those of the engines that this rank speaks
        to. Raises DistStoreError if another rank's do not come."""
        for one in self._followed:
            payloads = [bucket.payload() for _ in range(one.sources.count(self._rank))]
            self._store.set(self._key(one, self._rank), json.dumps(payloads))
        return {one.engine: self._payloads(bucket, one) for one in self._led}

    def settle(self, present: Collection[int]) -> None:
        """Returns when the bucket may go. `present`: the numbers of the engines that this rank speaks to and that took
        it; the others are left out."""
        for one in self._led:
            self._store.set(self._key(one, "taken"), str(one.engine in present))
        self._led = [one for one in self._led if one.engine in present]
        self._followed = [one for one in self._followed if self._wait_for(self._key(one, "taken")) == str(True)]
        self._bucket += 1

    def _payloads(self, bucket: Bucket, recipient: Recipient) -> list[str]:
        by_rank: dict[int, list[str]] = {}
        for other in set(recipient.sources) - {self._rank}:
            key = self._key(recipient, other)
            by_rank[other] = json.loads(self._wait_for(key))
            self._store.delete_key(key)
        return [bucket.payload() if source == self._rank else by_rank[source].pop(0) for source in recipient.sources]

    def _wait_for(self, key: str) -> str:
        self._store.wait([key], self._timeout)
        return self._store.get(key).decode()

    def _key(self, recipient: Recipient, what: int | str) -> str:
        return f"{recipient.engine}/{self._bucket}/{what}"
