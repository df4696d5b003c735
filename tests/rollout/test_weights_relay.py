"""Every process of an engine gets its weights from the training rank on its own GPU or, without, its own machine."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from fake_engines import FakeEngine, serving

from recipe.weight_sync.relay import Recipient, Relay
from recipe.weight_sync.result import UpdateResult
from recipe.weight_sync.sync import WeightSync
from recipe.weight_sync.tensor import NamedTensor, read_payload

BUCKETS = 3
BOUND_S = 240.0
SYNC = WeightSync("tensor", 40, 4, "127.0.0.1", timeout_s=60.0)
TIMEOUT = timedelta(seconds=120)


class Receiver(FakeEngine):
    """Notes the value that each of its processes is sent in every bucket; dies over bucket `dies_at`, or refuses it."""

    def __init__(self, dies_at: int | None = None, *, refuses: bool = False) -> None:
        super().__init__()
        self._refuses = refuses
        self.received: list[list[float]] = []
        self._dies_at = dies_at

    async def verb(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/update_weights_from_tensor":
            payloads = (await request.json())["serialized_named_tensors"]
            self.received.append([tensor[0].item() for payload in payloads for _, tensor in read_payload(payload)])
            if len(self.received) == self._dies_at:
                if self._refuses:
                    return web.json_response({"success": False, "message": "no room"}, status=400)
                assert request.transport is not None
                request.transport.abort()
        return await super().verb(request)


class Weights:
    """What a rank has gathered: every tensor holds the rank's number, by which the test knows whose it is."""

    def __init__(self, rank: int) -> None:
        self._rank, self.taken = rank, 0

    def __iter__(self) -> Iterator[NamedTensor]:
        for number in range(BUCKETS):
            self.taken += 1
            yield f"model.layers.{number}.mlp.gate.weight", torch.full((10,), float(self._rank))


async def send(*engines: Receiver) -> tuple[list[UpdateResult], list[Weights]]:
    """Engine 0 lies beside ranks 0 and 1, engine 1 beside ranks 2 and 0, two of its processes beside each."""
    store: Any = dist.HashStore()
    weights = [Weights(rank) for rank in range(3)]
    async with serving(*engines) as (first, second), asyncio.timeout(BOUND_S):
        recipients = [Recipient(0, first, (0, 0, 1, 1)), Recipient(1, second, (2, 2, 0, 0))]
        relays = [Relay(store, 1, rank, recipients, TIMEOUT) for rank in range(3)]
        results = await asyncio.gather(
            *(
                asyncio.to_thread(SYNC.send, weights[rank], relay.engines, "2", relay)
                for rank, relay in enumerate(relays)
            )
        )
    return list(results), weights


async def test_each_process_gets_the_payload_of_the_rank_beside_it() -> None:
    first, second = Receiver(), Receiver()
    results, weights = await send(first, second)
    assert first.received == [[0, 0, 1, 1]] * BUCKETS
    assert second.received == [[2, 2, 0, 0]] * BUCKETS
    assert results == [UpdateResult()] * 3
    assert [one.taken for one in weights] == [BUCKETS] * 3


@pytest.mark.parametrize(("dies_at", "refuses"), [(1, False), (2, False), (1, True)])
async def test_an_engine_that_dies_or_refuses_is_left_out_by_all_its_ranks_and_the_other_gets_all(
    dies_at: int, refuses: bool
) -> None:
    good, bad = Receiver(), Receiver(dies_at, refuses=refuses)
    results, weights = await send(good, bad)
    assert good.received == [[0, 0, 1, 1]] * BUCKETS
    assert len(bad.received) == dies_at
    assert [list(result.refused if refuses else result.failed) for result in results] == [[], [], [1]]
    assert [one.taken for one in weights] == [BUCKETS] * 3


async def test_an_engine_that_is_dead_when_the_update_begins_holds_nobody_up() -> None:
    class Dead(Receiver):
        async def verb(self, request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

    good, bad = Receiver(), Dead()
    results, weights = await send(good, bad)
    assert good.received == [[0, 0, 1, 1]] * BUCKETS
    assert list(results[2].failed) == [1]
    assert [one.taken for one in weights] == [BUCKETS] * 3


def test_word_that_a_bucket_is_taken_counts_in_its_own_update_only() -> None:
    store, recipients = dist.HashStore(), [Recipient(0, "http://engine", (0, 1))]
    Relay(store, 1, 0, recipients, TIMEOUT).settle([0])
    follower = Relay(store, 2, 1, recipients, timedelta(milliseconds=100))
    with pytest.raises(dist.DistError):
        follower.settle([])
