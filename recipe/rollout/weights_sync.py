"""From the trainer's weights to the engines, in buckets: the whole model is never held a second time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch

from recipe.config import Architecture, Config
from recipe.config.sglang_rules import EngineLayout
from recipe.errors import UserError
from recipe.rollout.client import RolloutClient
from recipe.rollout.weights_broadcast import BroadcastGroup, Meeting, TensorHeader, open_meeting
from recipe.rollout.weights_checksum import EngineChecksums
from recipe.rollout.weights_payload import Bucket, NamedTensor

T = TypeVar("T")

GROUP = "weight_update_group"
FUSED_ON_LOADING = (".self_attn.q_a_proj.weight", ".self_attn.kv_a_proj_with_mqa.weight")
_SHOWN = 3
"""Tensors that differ are named up to this number."""


@dataclass(frozen=True, slots=True)
class WeightSync:
    """How weights reach the engines."""

    transfer: Literal["tensor", "distributed", "disk"]
    bucket_bytes: int
    ranks_per_engine: int
    address: str
    """Of this machine, for the engines that join a broadcast."""
    checksums: Callable[[], EngineChecksums] | None = None
    """Of what is sent, to compare with what the engines hold; None: they are not compared."""

    @classmethod
    def of(cls, config: Config, architecture: Architecture, address: str) -> Self:
        rollout, cluster = config.rollout, config.cluster
        own_gpus = not cluster.colocate and cluster.device != "cpu" and torch.cuda.is_available()

        def checksums() -> EngineChecksums:
            return EngineChecksums(
                architecture.num_hidden_layers,
                architecture.n_routed_experts,
                as_float32=rollout.engine == "embedded",
            )

        layout = EngineLayout.of(config)
        return cls(
            transfer=rollout.update_weight_transfer or ("distributed" if own_gpus else "tensor"),
            bucket_bytes=rollout.update_weight_buffer_size,
            ranks_per_engine=layout.tp * layout.pp,
            address=address,
            checksums=checksums if rollout.check_weight_update_equal else None,
        )

    def send(self, weights: Iterable[NamedTensor], urls: Sequence[str], version: str) -> None:
        """Sends all tensors to every engine; after the last bucket they hold `version`. Raises UserError if an engine
        does not take them, or holds others afterwards."""
        checksums = self.checksums() if self.checksums is not None else None
        asyncio.run(self._send(checksums.watch(weights) if checksums is not None else weights, urls, version))
        if checksums is not None:
            asyncio.run(_compare(checksums.result(), urls, version))

    async def _send(self, weights: Iterable[NamedTensor], urls: Sequence[str], version: str) -> None:
        async with RolloutClient(urls) as client, client.weight_update():
            if self.transfer == "distributed":
                await self._broadcast(client, weights, version)
                return
            for bucket in buckets(weights, self.bucket_bytes):
                staged = Bucket.of(bucket)
                payloads = [[staged.payload() for _ in range(self.ranks_per_engine)] for _ in urls]
                await client.update_weights_from_tensor(payloads, weight_version=version)

    async def _broadcast(self, client: RolloutClient, weights: Iterable[NamedTensor], version: str) -> None:
        """Forms a group with the engines, sends them one bucket after the other, and ends it."""
        port, store = open_meeting(self.address)
        members = 1 + self.ranks_per_engine * len(client.urls)
        pending = buckets(weights, self.bucket_bytes)
        bucket = next(pending)
        meeting = Meeting(self.address, port, GROUP, members, "nccl" if bucket[0][1].is_cuda else "gloo")
        group = await _together(
            client.init_weights_update_group(meeting, self.ranks_per_engine),
            lambda: BroadcastGroup(meeting, 0, store),
        )
        while True:
            headers = [TensorHeader.of(name, tensor) for name, tensor in bucket]
            update = client.update_weights_from_distributed(headers, GROUP, weight_version=version)
            await _together(update, lambda bucket=bucket: group.send(bucket))  # type: ignore[misc]
            if (following := next(pending, None)) is None:
                break
            bucket = following
        await _together(client.destroy_weights_update_group(GROUP), group.leave)


def load_from_disk(folder: Path, urls: Sequence[str], version: str) -> None:
    """Has every engine read the Hugging Face checkpoint in `folder`, as `version`."""

    async def load() -> None:
        async with RolloutClient(urls) as client:
            await client.update_weights_from_disk(str(folder), weight_version=version)

    asyncio.run(load())


def buckets(weights: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Consecutive tensors whose bytes add up to at most `limit` (or a single larger one). Only where SGLang fuses two
    tensors as it loads them, and drops without a word what comes without its partner, a bucket waits for both."""
    pending: list[NamedTensor] = []
    size = 0
    lonely: set[str] = set()
    for name, tensor in weights:
        if pending and not lonely and size + tensor.nbytes > limit:
            yield pending
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
        if name.endswith(FUSED_ON_LOADING):
            lonely ^= {name.rpartition(".self_attn.")[0]}
    if pending:
        yield pending


async def _together(theirs: Awaitable[None], ours: Callable[[], T]) -> T:
    """Carries out both sides of a collective operation; `ours` blocks, in a thread of its own. If the engines refuse,
    that is raised at once, and nobody waits for the thread."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(ours())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="weight broadcast", daemon=True).start()
    done, _ = await asyncio.gather(asyncio.wrap_future(result), theirs)
    return done


async def _compare(expected: dict[str, str], urls: Sequence[str], version: str) -> None:
    async with RolloutClient(urls) as client:
        held = await client.weights_checksums()
    for url, found in zip(urls, held, strict=True):
        names = sorted(expected.keys() | found.keys())
        wrong = [name for name in names if expected.get(name) != found.get(name)]
        if wrong:
            raise UserError(
                f"after the update to version {version}, {len(wrong)} of {len(names)} tensors of the engine at {url} "
                f"are not the trainer's, the first of them {', '.join(wrong[:_SHOWN])}: samples would come from other "
                "weights than those that are trained; see the engine's log"
            )
