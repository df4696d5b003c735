"""SGLang's HTTP API for weights, of one engine."""

from collections.abc import Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from recipe.config.groups_rollout import InFlight
from recipe.sampling.errors import EngineRefused
from recipe.sampling.http import ask, open_session
from recipe.weight_sync.broadcast import TensorHeader, UpdateGroup
from recipe.weight_sync.checksum import RankChecksums

_PAUSE_MODES: dict[InFlight, str] = {"keep": "in_place", "recompute": "retract"}
"""SGLang's names."""


class WeightsClient:
    """Speaks to one engine. Use as an asynchronous context manager.

    Every verb raises EngineRefused if the engine does not take the weights, EngineUnreachable if it does not answer in
    `timeout_s`, or in a time of its own.
    """

    def __init__(self, number: int, url: str, timeout_s: float, in_flight: InFlight | None = None) -> None:
        """`in_flight`: what becomes of the cache of requests that are under way; None: there are none."""
        self.number = number
        self._in_flight = in_flight
        self._url = url
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        self._session = open_session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def pause_generation(self, timeout_s: float) -> None:
        """Has it stand still between two tokens, with what is under way, until `/continue_generation`. SGLang answers
        when it has passed that on to its schedulers, so that neither a compilation nor a long prompt delays it."""
        if self._in_flight is not None:
            await self._post("/pause_generation", {"mode": _PAUSE_MODES[self._in_flight]}, timeout_s)

    @property
    def _flush_cache(self) -> bool:
        return self._in_flight != "keep"

    async def begin_weight_update(self) -> None:
        """Opens the session in which SGLang 0.5.19 and later take `update_weights_from_tensor`."""
        await self._post_if_known("/begin_weight_update")

    async def end_weight_update(self) -> None:
        await self._post_if_known("/end_weight_update")

    async def update_weights_from_tensor(self, payloads: Sequence[str], *, weight_version: str) -> None:
        """Gives it the tensors of a `tensor.Bucket`, by a payload for each tensor-parallel rank. A payload can
        be read once, so nothing is sent twice."""
        body = {
            "serialized_named_tensors": list(payloads),
            "load_format": "flattened_bucket",
            "flush_cache": self._flush_cache,
            "weight_version": weight_version,
        }
        await self._post("/update_weights_from_tensor", body)

    async def update_weights_from_disk(self, model_path: str, *, weight_version: str) -> None:
        """Has it read the Hugging Face checkpoint in `model_path`."""
        body = {"model_path": model_path, "flush_cache": self._flush_cache, "weight_version": weight_version}
        await self._post("/update_weights_from_disk", body)

    async def init_weights_update_group(self, update_group: UpdateGroup, first_rank: int) -> None:
        """Has it join the broadcast group, its own ranks one after the other from `first_rank`."""
        body = {
            "master_address": update_group.address,
            "master_port": update_group.port,
            "rank_offset": first_rank,
            "world_size": update_group.world_size,
            "group_name": update_group.name,
            "backend": update_group.backend,
        }
        await self._post("/init_weights_update_group", body)

    async def update_weights_from_distributed(
        self, headers: Sequence[TensorHeader], group_name: str, *, weight_version: str
    ) -> None:
        """Has it receive these tensors, in this order, as one broadcast of their bytes."""
        body = {
            "names": [header.name for header in headers],
            "dtypes": [header.dtype for header in headers],
            "shapes": [list(header.shape) for header in headers],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": self._flush_cache,
            "weight_version": weight_version,
        }
        await self._post("/update_weights_from_distributed", body)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group_name})

    async def checksums(self) -> RankChecksums:
        """Those of every rank of its first pipeline stage, on whichever machine. With DP attention SGLang tells all of
        them once for each group."""
        answer = await self._post("/weights_checker", {"action": "checksum"})
        return {_tensor_rank(told["parallelism_info"]): told["checksums"] for told in answer["ranks"]}

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        return await ask(self._session, "POST", self._url + path, body, timeout_s=timeout_s or self._timeout_s)

    async def _post_if_known(self, path: str) -> None:
        try:
            await self._post(path, {})
        except EngineRefused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise


def _tensor_rank(info: dict[str, Any] | list[dict[str, Any]]) -> int:
    """`info`: where a rank lies in the engine; SGLang 0.5.21 says it for each of the rank's models."""
    first = info[0] if isinstance(info, list) else info
    return int(first["tp_rank"])
