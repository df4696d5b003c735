"""The part of SGLang's HTTP API that this project speaks, over the embedded engine.

A verb, or a field of one, that nobody here sends is refused. Other differences from SGLang 0.5.21 are on the side of
leniency or safety: a tensor update needs no session; an empty prompt in a batch, an out-of-vocabulary input id and
weights of a wrong shape are refused (SGLang's server dies); prompt and response may fill the context (SGLang cuts them
two tokens short of it, without a word); and seeds always decide.
"""

import asyncio
import json
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from recipe.engines.embedded.engine import EmbeddedEngine, PauseMode
from recipe.engines.embedded.protocol import Body, GenerateBody, Limits, RequestError, answer, read_sequences
from recipe.engines.embedded.running_sequence import RunningSequence
from recipe.engines.embedded.weights import WeightError
from recipe.weight_sync.broadcast import BroadcastGroup, TensorHeader, UpdateGroup
from recipe.weight_sync.tensor import PayloadError, read_payload

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes serve, once it is loaded."""

    engine: EmbeddedEngine
    limits: Limits
    model_path: Path
    groups: dict[str, BroadcastGroup] = field(default_factory=dict)
    """The broadcast groups that weights come by, by name."""


class EmptyBody(Body):
    """What says nothing."""


class TensorUpdateBody(Body):
    serialized_named_tensors: list[str]
    """One for each tensor-parallel rank; this engine is one rank."""
    load_format: Literal["flattened_bucket"]
    flush_cache: bool
    weight_version: str


class DiskUpdateBody(Body):
    model_path: Path
    flush_cache: bool
    weight_version: str


class GroupBody(Body):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: Literal["gloo"]


class LeaveGroupBody(Body):
    group_name: str


class DistributedUpdateBody(Body):
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    group_name: str
    load_format: Literal["flattened_bucket"]
    flush_cache: bool
    weight_version: str


class CheckBody(Body):
    action: Literal["checksum"]


class PauseBody(Body):
    mode: PauseMode


class AbortBody(Body):
    abort_all: Literal[True]


class MemoryBody(Body):
    tags: list[Literal["kv_cache", "weights", "cuda_graph"]]


class NotReadyError(Exception):
    """A call before the weights are loaded."""


async def _service(request: Request) -> Service:
    service: Service | None = request.app.state.service
    if service is None:
        raise NotReadyError
    return service


Ready = Annotated[Service, Depends(_service)]


def build_app() -> FastAPI:
    """The application; it answers 503 until `app.state.service` is set."""
    app = FastAPI(openapi_url=None)
    app.state.service = None
    app.add_exception_handler(NotReadyError, _not_ready)
    for refusal in (RequestError, PayloadError, WeightError, RequestValidationError, ValidationError):
        app.add_exception_handler(refusal, _refused)
    app.add_route("/generate", generate, methods=["POST"])
    app.post("/update_weights_from_tensor")(update_weights_from_tensor)
    app.post("/update_weights_from_disk")(update_weights_from_disk)
    app.post("/init_weights_update_group")(init_weights_update_group)
    app.post("/update_weights_from_distributed")(update_weights_from_distributed)
    app.post("/destroy_weights_update_group")(destroy_weights_update_group)
    app.post("/weights_checker")(check_weights)
    app.post("/begin_weight_update")(begin_weight_update)
    app.post("/end_weight_update")(end_weight_update)
    app.post("/pause_generation")(pause_generation)
    app.post("/continue_generation")(continue_generation)
    app.post("/abort_request")(abort_request)
    app.post("/flush_cache")(flush_cache)
    app.post("/release_memory_occupation")(release_memory_occupation)
    app.post("/resume_memory_occupation")(resume_memory_occupation)
    app.get("/health_generate")(health_generate)
    app.get("/model_info")(model_info)
    app.get("/server_info")(server_info)
    return app


async def generate(request: Request) -> Response:
    """Reads its body itself: FastAPI's way of doing that would cost more than all the rest of the request."""
    service = await _service(request)
    body = GenerateBody.model_validate_json(await request.body())
    sequences = read_sequences(body, service.limits)
    working = asyncio.ensure_future(service.engine.generate(sequences))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
    answers = [answer(sequence, _text(sequence, service.limits)) for sequence in sequences]
    return Response(json.dumps(answers), media_type="application/json")


async def update_weights_from_tensor(body: TensorUpdateBody, service: Ready) -> None:
    if len(body.serialized_named_tensors) != 1:
        raise RequestError(f"{len(body.serialized_named_tensors)} payloads for 1 tensor-parallel rank")
    weights = read_payload(body.serialized_named_tensors[0])
    await service.engine.update_weights(weights, body.weight_version, flush_cache=body.flush_cache)


async def update_weights_from_disk(body: DiskUpdateBody, service: Ready) -> None:
    await service.engine.load_weights(body.model_path, body.weight_version, flush_cache=body.flush_cache)


async def init_weights_update_group(body: GroupBody, service: Ready) -> None:
    update_group = UpdateGroup(body.master_address, body.master_port, body.group_name, body.world_size, body.backend)
    try:
        service.groups[body.group_name] = await asyncio.to_thread(BroadcastGroup.join, update_group, body.rank_offset)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"the group {body.group_name} was not joined: {error}") from error


async def update_weights_from_distributed(body: DistributedUpdateBody, service: Ready) -> None:
    group = service.groups.get(body.group_name)
    if group is None:
        raise RequestError(f"there is no group {body.group_name}; call init_weights_update_group first")
    headers = [TensorHeader(*header) for header in zip(body.names, body.dtypes, body.shapes, strict=True)]
    try:
        weights = await asyncio.to_thread(group.receive, headers)
    except RuntimeError as error:
        raise RequestError(f"the weights did not come: {error}") from error
    await service.engine.update_weights(weights, body.weight_version, flush_cache=body.flush_cache)


async def destroy_weights_update_group(body: LeaveGroupBody, service: Ready) -> None:
    group = service.groups.pop(body.group_name, None)
    if group is None:
        raise RequestError(f"there is no group {body.group_name}")
    group.leave()


async def check_weights(_: CheckBody, service: Ready) -> dict[str, Any]:
    checksums = await service.engine.weight_checksums()
    return {"ranks": [{"checksums": checksums, "parallelism_info": [{"tp_rank": 0}]}]}


async def begin_weight_update(_: EmptyBody, service: Ready) -> None:
    if not await service.engine.open_session():
        raise RequestError("a weight-update session is already open; call end_weight_update() first")


async def end_weight_update(_: EmptyBody, service: Ready) -> None:
    if not await service.engine.close_session():
        raise RequestError("no weight-update session is open; call begin_weight_update() first")


async def pause_generation(body: PauseBody, service: Ready) -> None:
    await service.engine.pause(body.mode)


async def continue_generation(_: EmptyBody, service: Ready) -> None:
    await service.engine.resume()


async def abort_request(_: AbortBody, service: Ready) -> None:
    await service.engine.abort()


async def flush_cache(_: EmptyBody, service: Ready) -> None:
    await service.engine.flush()


async def release_memory_occupation(body: MemoryBody, service: Ready) -> None:
    await service.engine.release_memory(body.tags)


async def resume_memory_occupation(body: MemoryBody, service: Ready) -> None:
    await service.engine.resume_memory(body.tags)


async def health_generate(service: Ready) -> Response:
    return Response(status_code=HTTPStatus.OK if await service.engine.generates() else HTTPStatus.SERVICE_UNAVAILABLE)


async def model_info(service: Ready) -> dict[str, str]:
    path = str(service.model_path)
    return {"model_path": path, "tokenizer_path": path, "weight_version": service.engine.version}


async def server_info(_: Ready) -> dict[str, str]:
    return {"version": "embedded"}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _text(sequence: RunningSequence, limits: Limits) -> str | None:
    """The response as text, without the stop token or string; None without a tokenizer."""
    if limits.tokenizer is None:
        return None
    matched = (sequence.finish_reason or {}).get("matched")
    ids = sequence.output_ids[:-1] if isinstance(matched, int) else sequence.output_ids
    text: str = limits.tokenizer.decode(ids, skip_special_tokens=False)
    return text.partition(matched)[0] if isinstance(matched, str) else text


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error)}}, HTTPStatus.BAD_REQUEST)


async def _not_ready(_: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
