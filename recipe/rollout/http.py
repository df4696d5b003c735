"""A request to an engine, and its failures by what can be done about them."""

from http import HTTPStatus
from typing import Any

import aiohttp

from recipe.rollout.errors import EngineAnswerError, EngineRefused, EngineUnreachable


async def ask(
    session: aiohttp.ClientSession,
    method: str,
    address: str,
    body: dict[str, Any] | None = None,
    *,
    timeout_s: float | None,
) -> Any:
    """The JSON of an answer; None where SGLang answers without one. Raises EngineRefused if the engine finds the
    request wrong, EngineUnreachable if it does not answer in time, or not as one that works, EngineAnswerError if its
    JSON is damaged."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, address, json=body, timeout=timeout) as response:
            if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise EngineUnreachable(f"{address} answered {response.status}")
            if response.status >= HTTPStatus.BAD_REQUEST:
                raise EngineRefused(address, response.status, await response.text())
            return await response.json() if response.content_type == "application/json" else None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineUnreachable(f"{address} did not answer: {error or type(error).__name__}") from error
    except ValueError as error:
        raise EngineAnswerError(f"{address} answered with damaged JSON: {error}") from error
