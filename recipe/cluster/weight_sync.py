"""From the trainer's weights to the engines, in buckets: the whole model is never held a second time."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from recipe.rollout.client import RolloutClient
from recipe.rollout.weights_payload import serialize_named_tensors, stage

BUCKET_BYTES = 512 << 20


def send_weights(weights: Iterable[tuple[str, Tensor]], urls: Sequence[str], version: str) -> None:
    """Sends all tensors to every engine; after the last bucket they hold `version`."""
    asyncio.run(_send(weights, urls, version))


async def _send(weights: Iterable[tuple[str, Tensor]], urls: Sequence[str], version: str) -> None:
    async with RolloutClient(urls) as client, client.weight_update():
        for bucket in buckets(weights, BUCKET_BYTES):
            payloads = [[serialize_named_tensors(bucket)] for _ in urls]
            await client.update_weights_from_tensor(payloads, weight_version=version)


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors whose bytes add up to at most `limit` (or a single larger one), staged in memory that the
    engine can open."""
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if pending and size + tensor.nbytes > limit:
            yield stage(pending)
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield stage(pending)
