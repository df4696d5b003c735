"""Weights leave the trainer in buckets that fit, none of SGLang's pairs is parted, and an engine that fails over them
is left out."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from aiohttp import web
from fake_engines import FakeEngine, serving
from hypothesis import given
from hypothesis import strategies as st

from recipe.config import Architecture, Config
from recipe.system.errors import UserError
from recipe.weight_sync.result import UpdateResult
from recipe.weight_sync.sync import WeightSync, buckets
from recipe.weight_sync.tensor import NamedTensor

LAYER = (
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.o_proj",
    "mlp.gate",
)


@given(sizes=st.lists(st.integers(1, 40), min_size=18, max_size=18), limit=st.integers(4, 200))
def test_buckets_fit_and_keep_pairs_together(sizes: list[int], limit: int) -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in LAYER]
    weights = [(name, torch.zeros(size)) for name, size in zip(names, sizes, strict=True)]
    found = list(buckets(weights, limit))
    assert [name for bucket in found for name, _ in bucket] == names
    for bucket in found:
        inside = {name for name, _ in bucket}
        for layer in range(3):
            pair = {f"model.layers.{layer}.self_attn.{part}.weight" for part in ("q_a_proj", "kv_a_proj_with_mqa")}
            assert len(pair & inside) in (0, 2)
        if len(bucket) > 4:
            assert sum(tensor.nbytes for _, tensor in bucket[:-4]) <= limit


WEIGHTS = [(f"model.layers.{number}.mlp.gate.weight", torch.ones(10)) for number in range(4)]
BOUND_S = 240.0


class FailingEngine(FakeEngine):
    """Fails at its second bucket."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way

    async def verb(self, request: web.Request) -> web.StreamResponse:
        answer = await super().verb(request)
        if self.calls.count("/update_weights_from_tensor") < 2:
            return answer
        match self._way:
            case "dies":
                assert request.transport is not None
                request.transport.abort()
            case "hangs":
                await asyncio.sleep(600)
            case "breaks":
                return web.Response(status=500)
            case "refuses":
                return web.json_response({"success": False, "message": "no room"}, status=400)
        return answer


class Weights:
    """What the trainer's ranks gather together; notes how far it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[NamedTensor]:
        for weight in WEIGHTS:
            self.taken += 1
            yield weight


def by_number(urls: list[str]) -> dict[int, str]:
    """Engines 7, 8, ..."""
    return dict(enumerate(urls, start=7))


def sync_of(timeout_s: float = 60.0) -> WeightSync:
    return WeightSync("tensor", 40, 1, "127.0.0.1", timeout_s=timeout_s)


@pytest.mark.parametrize("way", ["dies", "hangs", "breaks"])
async def test_an_engine_that_fails_over_an_update_is_named_and_the_others_get_all(way: str) -> None:
    good, bad, weights = FakeEngine(), FailingEngine(way), Weights()
    async with serving(bad, good) as urls, asyncio.timeout(BOUND_S):
        sync = sync_of(timeout_s=2.0) if way == "hangs" else sync_of()
        result = await asyncio.to_thread(sync.send, weights, by_number(urls), "2")
    assert list(result.failed) == [7]
    assert bad.url in result.failed[7]
    assert result.incomplete == ()
    assert weights.taken == len(WEIGHTS)
    update = ["/update_weights_from_tensor"]
    assert good.calls == ["/begin_weight_update", *update * len(WEIGHTS), "/end_weight_update"]
    assert bad.calls == ["/begin_weight_update", *update * 2]


async def test_an_update_tells_the_rate_of_the_slowest_engine() -> None:
    async with serving(FakeEngine()) as urls, asyncio.timeout(BOUND_S):
        result = await asyncio.to_thread(sync_of().send, WEIGHTS, by_number(urls), "2")
    assert result.bytes_per_second is not None
    assert 0 < result.bytes_per_second < 1e9  # 160 bytes in four requests
    faster, nobody = UpdateResult(bytes_per_second=1e12), UpdateResult()
    assert sum([faster, nobody], result).bytes_per_second == result.bytes_per_second
    assert (nobody + nobody).bytes_per_second is None


async def test_the_trainers_ranks_finish_though_no_engine_is_left() -> None:
    bad, weights = FailingEngine("dies"), Weights()
    async with serving(bad) as urls, asyncio.timeout(BOUND_S):
        result = await asyncio.to_thread(sync_of().send, weights, by_number(urls), "2")
    assert list(result.failed) == [7]
    assert weights.taken == len(WEIGHTS)


async def test_the_next_bucket_is_gathered_while_an_engine_loads_this_one() -> None:
    """The engine takes its first bucket only when the second one is there."""
    gathered = threading.Event()

    class Noticed(Weights):
        def __iter__(self) -> Iterator[NamedTensor]:
            for weight in super().__iter__():
                if self.taken == 3:  # which closes the second bucket
                    gathered.set()
                yield weight

    class Waiting(FakeEngine):
        async def verb(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/update_weights_from_tensor":
                assert await asyncio.to_thread(gathered.wait, 60)
            return await super().verb(request)

    weights = Noticed()

    async with serving(Waiting()) as urls, asyncio.timeout(BOUND_S):
        result = await asyncio.to_thread(sync_of().send, weights, by_number(urls), "2")
    assert result.failed == {}


async def test_the_trainers_ranks_finish_though_an_engine_refuses_and_the_run_ends_then() -> None:
    """Started again it would refuse them again; whoever waits in the gathering could not save."""
    good, bad, weights = FakeEngine(), FailingEngine("refuses"), Weights()
    async with serving(bad, good) as urls, asyncio.timeout(BOUND_S):
        result = await asyncio.to_thread(sync_of().send, weights, by_number(urls), "2")
    assert (list(result.failed), list(result.refused)) == ([], [7])
    assert weights.taken == len(WEIGHTS)
    assert good.calls.count("/update_weights_from_tensor") == len(WEIGHTS)
    assert bad.calls.count("/update_weights_from_tensor") == 2
    with pytest.raises(UserError, match="no room"):
        (UpdateResult() + result).check_taken()


async def test_an_engine_that_refuses_a_broadcast_is_told_with_those_that_lost_it() -> None:
    class Refusing(FakeEngine):
        async def verb(self, request: web.Request) -> web.StreamResponse:
            if request.path == "/init_weights_update_group":
                return web.json_response({"success": False, "message": "no group"}, status=400)
            return await super().verb(request)

    weights, sync = Weights(), WeightSync("distributed", 40, 1, "127.0.0.1")
    async with asyncio.timeout(BOUND_S), serving(Refusing(), WaitingForOthers()) as urls:
        result = await asyncio.to_thread(sync.send, weights, by_number(urls), "2")
    assert (list(result.refused), result.failed, result.incomplete) == ([7], {}, (8,))
    assert weights.taken == len(WEIGHTS)


class Slow(FakeEngine):
    """Takes longer for some verbs."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self._seconds = seconds

    async def verb(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(self._seconds.get(request.path, 0.0))
        return await super().verb(request)


@pytest.mark.parametrize("transfer", ["tensor", "disk"])
async def test_an_engine_that_does_not_stand_still_is_left_out_long_before_one_that_is_slow_over_its_weights(
    transfer: str, tmp_path: Path
) -> None:
    """The others stand still while it is waited for."""
    settings = {
        "model": {"hf_checkpoint": "hf"},
        "data": {"prompt_data": "prompts"},
        "rollout": {
            "engine": "embedded",
            "num_rollout": 1,
            "rollout_batch_size": 1,
            "rollout_max_response_len": 4,
            "update_weight_transfer": transfer,
            "update_weight_in_flight": "keep",
            "rollout_health_check_timeout": 0.5,
        },
        "optimizer": {"lr": 1e-3},
    }
    sync = WeightSync.of(Config.model_validate(settings), cast(Architecture, None), "127.0.0.1")
    update = f"/update_weights_from_{transfer}"
    slow, hanging = Slow({update: 1.0}), Slow({"/pause_generation": 60.0})
    async with serving(slow, hanging) as urls, asyncio.timeout(BOUND_S):
        if transfer == "tensor":
            result = await asyncio.to_thread(sync.send, WEIGHTS, by_number(urls), "2")
        else:
            result = await asyncio.to_thread(sync.load_from_disk, tmp_path, by_number(urls), "2")
    assert list(result.failed) == [8]
    assert "/pause_generation did not answer" in result.failed[8]
    assert update in slow.calls
    assert hanging.calls == []


class WaitingForOthers(FakeEngine):
    """Has joined a broadcast group in which another one is missing."""

    async def verb(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/init_weights_update_group":
            await asyncio.sleep(600)
        return await super().verb(request)


class Silent(FakeEngine):
    """Joins no broadcast group, since it hangs or is dead."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way

    async def verb(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/init_weights_update_group":
            assert request.transport is not None
            await asyncio.sleep(600 if self._way == "hangs" else 0)
            request.transport.abort()
        return await super().verb(request)


@pytest.mark.parametrize("way", ["hangs", "dies"])
async def test_a_broadcast_that_lost_a_member_is_over_for_the_others_at_once(way: str) -> None:
    """They wait in it, as they would for a member that joined and then failed."""

    bad, good, weights = Silent(way), WaitingForOthers(), Weights()
    sync = WeightSync("distributed", 40, 1, "127.0.0.1", timeout_s=1.0 if way == "hangs" else 60.0)
    async with asyncio.timeout(BOUND_S), serving(bad, good) as urls:
        result = await asyncio.to_thread(sync.send, weights, by_number(urls), "2")
    assert weights.taken == len(WEIGHTS)
    if way == "dies":
        assert list(result.failed) == [7]
        assert result.incomplete == (8,)
