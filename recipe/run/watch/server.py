"""The page's server: static files of this package, and answers as JSON. It listens on this machine alone."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from recipe.run.watch.answers import Answers
from recipe.system.errors import UserError

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine under which the page may be asked for: another name is a foreign page's, which had it resolved
to here."""
NOT_FOUND, REFUSED = 404, 403

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(folder: Path) -> web.Application:
    """The server of the runs in a folder. Raises UserError if there is no such folder."""
    answers, turn = Answers(folder), asyncio.Lock()

    def answering(ask: Callable[[web.Request], dict[str, Any]]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                async with turn:  # while it reads, the loop goes on
                    found = await asyncio.to_thread(ask, request)
            except UserError as error:
                return web.json_response({"error": str(error)}, status=NOT_FOUND)
            response = web.Response(body=await asyncio.to_thread(_encoded, found), content_type="application/json")
            response.enable_compression()
            return response

        return handle

    preparing: set[asyncio.Task[None]] = set()

    async def prepare(name: str) -> None:
        with suppress(UserError):
            async with turn:
                await asyncio.to_thread(answers.prepare_samples, name)

    async def metrics(request: web.Request) -> web.StreamResponse:
        response = await answering(
            lambda request: answers.metrics(_name(request), _number(request, "after"), request.query.get("generation"))
        )(request)
        preparing.add(task := asyncio.create_task(prepare(_name(request))))
        task.add_done_callback(preparing.discard)
        return response

    app = web.Application(middlewares=[_guarded])
    app.router.add_get("/", _index)
    run = "/api/run/{name}"
    app.router.add_get("/api/runs", answering(lambda _: answers.runs()))
    app.router.add_get(f"{run}/head", answering(lambda request: answers.head(_name(request))))
    app.router.add_get(f"{run}/metrics", metrics)
    app.router.add_get(
        f"{run}/timeline", answering(lambda request: answers.course(_name(request), _number(request, "rollout")))
    )
    app.router.add_get(f"{run}/samples", answering(lambda request: answers.samples(_name(request), request.query)))
    app.router.add_get(
        f"{run}/sample",
        answering(
            lambda request: answers.sample(
                _name(request), _number(request, "rollout") or 0, _number(request, "line") or 0
            )
        ),
    )
    app.router.add_static("/", STATIC)
    return app


def _encoded(found: dict[str, Any]) -> bytes:
    """JSON that any browser reads: half of a surrogate pair, which a file may hold, stays an escape."""
    return json.dumps(found, ensure_ascii=True, allow_nan=False).encode()


async def _index(_: web.Request) -> web.StreamResponse:
    return web.FileResponse(STATIC / "index.html")


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.host.rpartition(":")[0] not in LOCAL and request.host not in LOCAL:
        return web.json_response({"error": f"this page is not at {request.host}"}, status=REFUSED)
    response = await handler(request)
    response.headers.update(HEADERS)
    return response


def _name(request: web.Request) -> str:
    return request.match_info["name"]


def _number(request: web.Request, name: str) -> int | None:
    """A whole number of the query; None where it is not given. Raises UserError for other text."""
    text = request.query.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text!r} is no number")
    return int(text) if text else None
