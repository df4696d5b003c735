"""SGLang's HTTP API over the embedded engine.

Differences from SGLang 0.5.21, all on the side of leniency or safety: a tensor update needs no session; an empty
prompt in a batch, an out-of-vocabulary input id and weights of a wrong shape are refused (SGLang's server dies);
sampling parameters it does not know, or of a wrong type, are errors (SGLang answers 500); prompt and response may fill
the context (SGLang cuts them two tokens short of it, without a word); and seeds always decide.
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
from pydantic import BaseModel, ValidationError

from recipe.engines.embedded.engine import MEMORY_TAGS, EmbeddedEngine, PauseMode
from recipe.engines.embedded.protocol import (
    Defaults,
    GenerateBody,
    Limits,
    RequestError,
    answer,
    read_sequences,
)
from recipe.engines.embedded.running_sequence import RunningSequence
from recipe.engines.embedded.weights import WeightError
from recipe.weight_sync.broadcast import BroadcastGroup, TensorHeader, UpdateGroup
from recipe.weight_sync.checksum import overall
from recipe.weight_sync.tensor import PayloadError, read_payload

CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes serve, once it is loaded."""

    engine: EmbeddedEngine
    limits: Limits
    defaults: Defaults
    model_path: Path
    model_type: str
    architectures: list[str]
    max_running_requests: int
    groups: dict[str, BroadcastGroup] = field(default_factory=dict)
    """The broadcast groups that weights come by, by name."""


class TensorUpdateBody(BaseModel):
    serialized_named_tensors: list[str]
    """One for each tensor-parallel rank; this engine is one rank."""
    load_format: Literal["flattened_bucket"]
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class DiskUpdateBody(BaseModel):
    model_path: Path
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class GroupBody(BaseModel):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: Literal["gloo"] = "gloo"


class LeaveGroupBody(BaseModel):
    group_name: str = "weight_update_group"


class DistributedUpdateBody(BaseModel):
    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    group_name: str = "weight_update_group"
    load_format: Literal["flattened_bucket"]
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class CheckBody(BaseModel):
    action: Literal["checksum"] = "checksum"


class PauseBody(BaseModel):
    mode: PauseMode = "abort"


class AbortBody(BaseModel):
    rid: str | None = None
    abort_all: bool = False


class MemoryBody(BaseModel):
    tags: list[str] | None = None


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
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(ValidationError, _malformed)
    app.add_route("/generate", generate, methods=["POST", "PUT"])
    app.post("/update_weights_from_tensor")(update_weights_from_tensor)
    app.post("/update_weights_from_disk")(update_weights_from_disk)
    app.post("/init_weights_update_group")(init_weights_update_group)
    app.post("/update_weights_from_distributed")(update_weights_from_distributed)
    app.post("/destroy_weights_update_group")(destroy_weights_update_group)
    app.api_route("/weights_checker", methods=["GET", "POST"])(check_weights)
    app.post("/begin_weight_update")(begin_weight_update)
    app.post("/end_weight_update")(end_weight_update)
    app.post("/pause_generation")(pause_generation)
    app.post("/continue_generation")(continue_generation)
    app.post("/abort_request")(abort_request)
    app.api_route("/flush_cache", methods=["GET", "POST"])(flush_cache)
    app.api_route("/release_memory_occupation", methods=["GET", "POST"])(release_memory_occupation)
    app.api_route("/resume_memory_occupation", methods=["GET", "POST"])(resume_memory_occupation)
    app.get("/health")(health)
    app.get("/health_generate")(health)
    app.get("/model_info")(model_info)
    app.get("/server_info")(server_info)
    return app


async def generate(request: Request) -> Response:
    """Reads its body itself: FastAPI's way of doing that would cost more than all the rest of the request."""
    service = await _service(request)
    body = GenerateBody.model_validate_json(await request.body())
    sequences = read_sequences(body, service.limits, service.defaults)
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
    answers = [
        answer(sequence, text) for sequence, text in zip(sequences, _texts(sequences, service.limits), strict=True)
    ]
    single = len(answers) == 1 and not body.is_batch
    return Response(json.dumps(answers[0] if single else answers), media_type="application/json")


async def update_weights_from_tensor(body: TensorUpdateBody, service: Ready) -> JSONResponse:
    if len(body.serialized_named_tensors) != 1:
        return _outcome(False, f"{len(body.serialized_named_tensors)} payloads for 1 tensor-parallel rank")
    if body.abort_all_requests:
        await service.engine.abort(None)
    try:
        weights = read_payload(body.serialized_named_tensors[0])
        await service.engine.update_weights(weights, body.weight_version)
    except (PayloadError, WeightError) as error:
        return _outcome(False, str(error))
    return _outcome(True, _updated(body.weight_version))


async def update_weights_from_disk(body: DiskUpdateBody, service: Ready) -> JSONResponse:
    if body.abort_all_requests:
        await service.engine.abort(None)
    try:
        await service.engine.load_weights(body.model_path, body.weight_version)
    except WeightError as error:
        return _outcome(False, str(error), num_paused_requests=0)
    return _outcome(True, _updated(body.weight_version), num_paused_requests=0)


async def init_weights_update_group(body: GroupBody, service: Ready) -> JSONResponse:
    update_group = UpdateGroup(body.master_address, body.master_port, body.group_name, body.world_size, body.backend)
    try:
        service.groups[body.group_name] = await asyncio.to_thread(BroadcastGroup.join, update_group, body.rank_offset)
    except (RuntimeError, ValueError) as error:
        return _outcome(False, f"Failed to initialize custom process group: {error}.")
    return _outcome(True, "Succeeded to initialize custom process group.")


async def update_weights_from_distributed(body: DistributedUpdateBody, service: Ready) -> JSONResponse:
    group = service.groups.get(body.group_name)
    if group is None:
        return _outcome(False, f"there is no group {body.group_name}; call init_weights_update_group first")
    if body.abort_all_requests:
        await service.engine.abort(None)
    headers = [TensorHeader(*header) for header in zip(body.names, body.dtypes, body.shapes, strict=True)]
    try:
        weights = await asyncio.to_thread(group.receive, headers)
        await service.engine.update_weights(weights, body.weight_version)
    except (RuntimeError, WeightError) as error:
        return _outcome(False, f"Failed to update parameter online: {error}.")
    return _outcome(True, _updated(body.weight_version))


async def destroy_weights_update_group(body: LeaveGroupBody, service: Ready) -> JSONResponse:
    group = service.groups.pop(body.group_name, None)
    if group is None:
        return _outcome(False, "The group to be destroyed does not exist.")
    group.leave()
    return _outcome(True, "Succeeded to destroy custom process group.")


async def check_weights(service: Ready, body: CheckBody | None = None) -> dict[str, Any]:
    checksums = await service.engine.weight_checksums()
    alone = {"role": "target", "rank": 0, "size": 1} | {
        f"{kind}_{what}": value for kind in ("tp", "dp", "pp") for what, value in (("rank", 0), ("size", 1))
    }
    whole = overall(checksums)
    return {
        "success": True,
        "message": "Success.",
        "ranks": [{"checksums": checksums, "per_gpu_checksum": whole, "parallelism_info": [alone]}],
        "per_engine_checksum": overall({"rank 0": whole}),
    }


async def begin_weight_update(service: Ready) -> JSONResponse:
    if await service.engine.open_session():
        return _outcome(True, "Success")
    return _outcome(False, "a weight-update session is already open; call end_weight_update() first")


async def end_weight_update(service: Ready) -> JSONResponse:
    if await service.engine.close_session():
        return _outcome(True, "Success")
    return _outcome(False, "no weight-update session is open; call begin_weight_update() first")


async def pause_generation(service: Ready, body: PauseBody | None = None) -> dict[str, str]:
    await service.engine.pause((body or PauseBody()).mode)
    return {"message": "Generation paused successfully.", "status": "ok"}


async def continue_generation(service: Ready) -> dict[str, str]:
    await service.engine.resume()
    return {"message": "Generation continued successfully.", "status": "ok"}


async def abort_request(body: AbortBody, service: Ready) -> Response:
    if body.abort_all or body.rid:
        await service.engine.abort(None if body.abort_all else body.rid)
    return Response()


async def flush_cache(service: Ready) -> Response:
    try:
        await service.engine.flush()
    except RequestError as error:
        return Response(f"Flush cache failed: {error}\n", status_code=HTTPStatus.BAD_REQUEST)
    return Response("Cache flushed.\n")


async def release_memory_occupation(service: Ready, body: MemoryBody | None = None) -> None:
    await service.engine.release_memory(_tags(body))


async def resume_memory_occupation(service: Ready, body: MemoryBody | None = None) -> None:
    await service.engine.resume_memory(_tags(body))


async def health(service: Ready) -> Response:
    return Response(status_code=HTTPStatus.OK if await service.engine.generates() else HTTPStatus.SERVICE_UNAVAILABLE)


async def model_info(service: Ready) -> dict[str, Any]:
    return {
        "model_path": str(service.model_path),
        "tokenizer_path": str(service.model_path),
        "is_generation": True,
        "weight_version": service.engine.version,
        "model_type": service.model_type,
        "architectures": service.architectures,
    }


async def server_info(service: Ready) -> dict[str, Any]:
    running, waiting = service.engine.load
    return {
        "model_path": str(service.model_path),
        "context_length": service.limits.context_length,
        "max_running_requests": service.max_running_requests,
        "internal_states": [{"running": running, "waiting": waiting}],
        "version": "embedded",
    }


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _texts(sequences: list[RunningSequence], limits: Limits) -> list[str | None]:
    """The responses as text, the stop token or string cut off unless `no_stop_trim`; None without a tokenizer."""
    if limits.tokenizer is None:
        return [None] * len(sequences)
    texts: list[str | None] = []
    for sequence in sequences:
        matched = (sequence.finish_reason or {}).get("matched")
        ids = sequence.output_ids
        trim = not sequence.sampling.no_stop_trim
        if trim and isinstance(matched, int):
            ids = ids[:-1]
        text = limits.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=sequence.sampling.skip_special_tokens)
        if isinstance(matched, str) and matched in text:
            end = text.index(matched)
            text = text[: end if trim else end + len(matched)]
        texts.append(text)
    return texts


def _tags(body: MemoryBody | None) -> list[str]:
    tags = body.tags if body is not None and body.tags else list(MEMORY_TAGS)
    unknown = set(tags) - set(MEMORY_TAGS)
    if unknown:
        raise RequestError(f"unknown tags {sorted(unknown)}; there are {', '.join(MEMORY_TAGS)}")
    return tags


def _updated(version: str | None) -> str:
    return "Success" if version is None else f"Success Weight version updated to {version}."


def _outcome(success: bool, message: str, **others: int) -> JSONResponse:
    status = HTTPStatus.OK if success else HTTPStatus.BAD_REQUEST
    return JSONResponse({"success": success, "message": message, **others}, status)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error)}}, HTTPStatus.BAD_REQUEST)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    status = HTTPStatus.BAD_REQUEST
    content = {"object": "error", "message": str(error), "type": status.phrase, "param": None, "code": status.value}
    return JSONResponse(content, status)


async def _not_ready(_: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
