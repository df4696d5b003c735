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
Question = Callable[[Answers, web.Request], dict[str, Any]]

QUESTIONS: dict[str, Question] = {
    "/api/runs": lambda answers, _: answers.runs(),
    "/api/run/{name}/head": lambda answers, request: answers.head(_name(request)),
    "/api/run/{name}/metrics": lambda answers, request: answers.metrics(
        _name(request), _number(request, "after"), request.query.get("generation")
    ),
    "/api/run/{name}/timeline": lambda answers, request: answers.course(_name(request), _number(request, "rollout")),
    "/api/run/{name}/samples": lambda answers, request: answers.samples(_name(request), request.query),
    "/api/run/{name}/sample": lambda answers, request: answers.sample(
        _name(request), _number(request, "rollout") or 0, _number(request, "line") or 0
    ),
}
"""What may be asked, by path."""


class PageServer:
    """Answers one question at a time, in a thread: while it reads files, the event loop goes on."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if there is no such folder of runs."""
        self._answers, self._turn = Answers(folder), asyncio.Lock()
        self._preparing: set[asyncio.Task[None]] = set()

    def application(self) -> web.Application:
        """What aiohttp serves."""
        app = web.Application(middlewares=[_guarded])
        app.router.add_get("/", _index)
        for path, question in QUESTIONS.items():
            app.router.add_get(path, self._answering(question))
        app.router.add_static("/", STATIC)
        return app

    def _answering(self, question: Question) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                async with self._turn:
                    found = await asyncio.to_thread(question, self._answers, request)
            except UserError as error:
                return web.json_response({"error": str(error)}, status=NOT_FOUND)
            if "columns" in found:  # whoever looks at curves will look at samples
                self._preparing.add(task := asyncio.create_task(self._prepare(_name(request))))
                task.add_done_callback(self._preparing.discard)
            response = web.Response(body=await asyncio.to_thread(_encoded, found), content_type="application/json")
            response.enable_compression()
            return response

        return handle

    async def _prepare(self, name: str) -> None:
        with suppress(UserError):
            found = True
            while found:
                async with self._turn:
                    found = await asyncio.to_thread(self._answers.prepare_samples, name)


def _encoded(found: dict[str, Any]) -> bytes:
    """JSON that any browser reads: half of a surrogate pair, which a file may hold, stays an escape."""
    return json.dumps(found, ensure_ascii=True, allow_nan=False).encode()


async def _index(_: web.Request) -> web.StreamResponse:
    return web.FileResponse(STATIC / "index.html")


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.host.rpartition(":")[0] not in LOCAL and request.host not in LOCAL:
        return web.json_response({"error": f"this page is not at {request.host}"}, status=REFUSED)
    try:
        response = await handler(request)
    except web.HTTPException as answer:
        answer.headers.update(HEADERS)
        raise
    response.headers.update(HEADERS)
    return response


def _name(request: web.Request) -> str:
    return request.match_info["name"]


def _number(request: web.Request, name: str) -> int | None:
    """A whole number of the query; None where it is not given. Raises UserError for other text."""
    text = request.query.get(name, "")
    if text and not (text.isdecimal() and len(text) < 10):
        raise UserError(f"{name}={text!r} is no number")
    return int(text) if text else None
