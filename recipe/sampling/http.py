"""The client of SGLang's HTTP API: one request to an engine, and its failures by what can be done about them."""

import asyncio
from http import HTTPStatus
from typing import Any

import aiohttp

from recipe.sampling.errors import EngineAnswerError, EngineError, EngineRefused, EngineUnreachable
from recipe.system.errors import shortened
from recipe.system.json_text import parse_json

KEEP_ALIVE_S = 2.0
"""An idle connection is not used again after so long: servers (uvicorn) close theirs after 5 s."""
LARGEST_BODY = 256 << 20
"""Bytes of an answer at most: 64 responses of 32,768 tokens with their log-probs take about half."""


def open_session() -> aiohttp.ClientSession:
    """Connections to engines, as many at a time as there are requests. Closed by whoever opens it."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))


async def ask(
    session: aiohttp.ClientSession,
    method: str,
    address: str,
    body: dict[str, Any] | None = None,
    *,
    timeout_s: float | None,
    largest: int = LARGEST_BODY,
) -> Any:
    """The JSON of an answer of at most `largest` bytes; None where SGLang answers without one. Raises EngineRefused if
    the engine finds the request wrong, EngineUnreachable if it does not answer in time, or not as one that works,
    EngineAnswerError if its JSON is damaged."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, address, json=body, timeout=timeout, allow_redirects=False) as response:
            if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise EngineUnreachable(f"{address} answered {response.status}")
            if response.status >= HTTPStatus.BAD_REQUEST:
                raise EngineRefused(address, response.status, (await _body_of(response)).decode(errors="replace"))
            if response.status >= HTTPStatus.MULTIPLE_CHOICES:
                where = shortened(response.headers.get("Location", "elsewhere"))
                raise EngineAnswerError(f"{address} sends on to {where}, which is not followed: give that address")
            return (
                parse_json(await _body_of(response, largest)) if response.content_type == "application/json" else None
            )
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineUnreachable(f"{address} did not answer: {error or type(error).__name__}") from error
    except ValueError as error:
        raise EngineAnswerError(f"{address} answered with damaged JSON: {error}") from error


async def _body_of(response: aiohttp.ClientResponse, largest: int = LARGEST_BODY) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > largest:
            raise EngineAnswerError(f"{response.url} answers with more than {largest >> 20} MiB: no engine does")
    return bytes(body)


async def generates(session: aiohttp.ClientSession, url: str, timeout_s: float) -> bool:
    """Whether the engine at `url` generates a token within so many seconds."""
    try:
        await ask(session, "GET", url + "/health_generate", timeout_s=timeout_s)
    except EngineError:
        return False
    return True


def ask_blocking(method: str, address: str, body: dict[str, Any] | None = None, *, timeout_s: float | None) -> Any:
    """`ask` where no event loop runs, on a connection of its own."""

    async def once() -> Any:
        async with open_session() as session:
            return await ask(session, method, address, body, timeout_s=timeout_s)

    return asyncio.run(once())


def succeeds(method: str, address: str, body: dict[str, Any] | None = None, *, timeout_s: float) -> bool:
    """Whether `ask_blocking` gets an answer."""
    try:
        ask_blocking(method, address, body, timeout_s=timeout_s)
    except EngineError:
        return False
    return True
