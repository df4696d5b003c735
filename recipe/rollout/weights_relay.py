"""Weights for an engine over several machines, by handles that open only on the machine where they were made.

On each of its machines a rank of the trainer holds every bucket in memory that SGLang's processes there can open. The
first of these ranks speaks to the engine: it gathers the payloads of all, in the order of SGLang's tensor-parallel
ranks, of which each reads the one with its own number, and tells the others when the bucket is taken and may go.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from recipe.rollout.weights_payload import Bucket


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank of the trainer does for one engine."""

    engine: int
    url: str
    node_rank: int
    """Of the engine's machine that this rank hands weights to; with 0 it speaks to the engine."""
    nnodes: int
    tp_ranks: int
    """Of SGLang's processes on that machine."""


class Relay:
    """One rank's side of an update, for all its shares."""

    def __init__(self, store: dist.Store, update: int, shares: Sequence[Share], timeout: timedelta) -> None:
        """`store`: of all ranks; `update`: its number, the same on all; `timeout`: after which another rank is given
        up."""
        self._store, self._timeout = dist.PrefixStore(f"weights/{update}", store), timeout
        self._led = [share for share in shares if share.node_rank == 0]
        self._followed = [share for share in shares if share.node_rank]
        self._bucket = 0

    @property
    def is_open(self) -> bool:
        """Whether a share is left: an engine that fails is left out."""
        return bool(self._led or self._followed)

    def exchange(self, bucket: Bucket) -> dict[str, list[str]]:
        """Hands over the payloads of the next bucket. Returns, by address, those of the engines that this rank speaks
        to. Raises DistStoreError if another rank's do not come."""
        for share in self._followed:
            self._store.set(self._key(share, share.node_rank), json.dumps(_payloads(bucket, share)))
        return {share.url: [*_payloads(bucket, share), *self._of_others(share)] for share in self._led}

    def settle(self, present: Collection[str]) -> None:
        """Returns when the bucket may go. `present`: the engines that this rank speaks to and that took it; the others
        are left out."""
        for share in self._led:
            self._store.set(self._key(share, 0), str(share.url in present))
        self._led = [share for share in self._led if share.url in present]
        self._followed = [share for share in self._followed if self._wait_for(self._key(share, 0)) == str(True)]
        self._bucket += 1

    def _of_others(self, share: Share) -> list[str]:
        payloads: list[str] = []
        for node_rank in range(1, share.nnodes):
            key = self._key(share, node_rank)
            payloads += json.loads(self._wait_for(key))
            self._store.delete_key(key)
        return payloads

    def _wait_for(self, key: str) -> str:
        self._store.wait([key], self._timeout)
        return self._store.get(key).decode()

    def _key(self, share: Share, node_rank: int) -> str:
        return f"{share.engine}/{self._bucket}/{node_rank}"


def _payloads(bucket: Bucket, share: Share) -> list[str]:
    return [bucket.payload() for _ in range(share.tp_ranks)]
