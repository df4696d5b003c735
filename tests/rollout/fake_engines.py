"""Engines that answer what a test wants."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from rollout_support import make_prompt

from recipe.sampling.sample import SampleGroup

Handler = Callable[[dict[str, Any]], Awaitable[web.Response]]


def answers(body: dict[str, Any], reason: str = "stop", version: str = "1") -> web.Response:
    """What an engine would answer: token i + 1 for sample i, made by the weights of `version`."""
    return web.json_response(
        [
            {
                "text": "x",
                "output_ids": [number + 1],
                "meta_info": {
                    "finish_reason": {"type": reason},
                    "weight_version": version,
                    "output_token_logprobs": [[-0.5, number + 1, None]],
                },
            }
            for number in range(len(body["input_ids"]))
        ]
    )


class FakeEngine:
    """Answers /generate by `handler`; notes what it was asked."""

    def __init__(self, handler: Handler | None = None) -> None:
        self.handler = handler
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.healthy = True
        self.busy = asyncio.Event()
        """It has had two requests."""
        self.url = ""

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) > 1:
            self.busy.set()
        return answers(body) if self.handler is None else await self.handler(body)

    async def verb(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if request.path == "/health_generate":
            return web.Response(status=200 if self.healthy else 503)
        if request.path.endswith("_weight_update") and self.handler is not None:
            return web.Response(status=404)
        return web.json_response({"success": True, "message": "", "weight_version": "1"})


@asynccontextmanager
async def serving(*engines: FakeEngine) -> AsyncIterator[list[str]]:
    runners = []
    for engine in engines:
        app = web.Application()
        app.router.add_post("/generate", engine.generate)
        app.router.add_route("*", "/{verb}", engine.verb)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    yield [engine.url for engine in engines]
    for runner in runners:
        await runner.cleanup()


def group_of(index: int = 0, n_samples: int = 2) -> SampleGroup:
    return SampleGroup.of(make_prompt(index, (5, 6, 7)), index, n_samples)
