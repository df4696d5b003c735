"""Aborting, and giving memory back."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from rollout_support import GREEDY, PROMPT, EngineUnderTest, Kind, generation

from recipe.sampling.sample import FinishReason
from recipe.sampling.sglang_response import read_sample

LONG = replace(GREEDY, max_new_tokens=50)
MANY = generation([PROMPT] * 1000, LONG)
"""Keeps the engine busy for many seconds."""


class Background:
    """A request that runs beside the test."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        self._result = call()

    def result(self) -> Any:
        self._thread.join(240)
        assert not self._thread.is_alive()
        return self._result


def _wait_for_flush(engine: EngineUnderTest, status: int) -> None:
    """Returns when the engine answers a flush so: 200 if it is idle, 400 if not."""
    deadline = time.monotonic() + 120
    while engine.request("POST", "/flush_cache", {})[0] != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def _busy(engine: EngineUnderTest) -> Iterator[None]:
    request = Background(lambda: engine.post("/generate", MANY))
    try:
        _wait_for_flush(engine, 400)
        yield
    finally:
        engine.post("/abort_request", {"abort_all": True})
        request.result()


def test_abort_ends_all_requests_with_what_they_have(engine: EngineUnderTest) -> None:
    expected = engine.generate_one(PROMPT, LONG)["output_ids"]
    for attempt in range(20):
        requests = [Background(lambda: engine.generate_one(PROMPT, LONG)) for _ in range(2)]
        time.sleep(0.01 * 1.35**attempt)
        engine.post("/abort_request", {"abort_all": True})
        samples = [read_sample(request.result()) for request in requests]
        if {sample.finish_reason for sample in samples} == {FinishReason.ABORT} and any(s.ids for s in samples):
            break
    else:
        pytest.fail("in 20 attempts the requests were never aborted midway")
    for sample in samples:
        assert len(sample.log_probs) == len(sample.ids) < len(expected)
        if engine.kind is Kind.EMBEDDED:
            assert sample.ids == expected[: len(sample.ids)]


def test_a_client_that_leaves_takes_its_request_along(embedded: EngineUnderTest) -> None:
    connection = http.client.HTTPConnection(urlsplit(embedded.url).netloc)
    connection.request("POST", "/generate", json.dumps(MANY))
    _wait_for_flush(embedded, 400)
    embedded.post("/pause_generation", {"mode": "in_place"})  # it does not end by itself
    connection.close()
    _wait_for_flush(embedded, 200)


def test_released_memory_refuses_to_generate_until_it_is_resumed(embedded: EngineUnderTest) -> None:
    expected = embedded.generate_one(PROMPT, LONG)["output_ids"]
    embedded.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    assert "released" in embedded.refuse("/generate", generation([PROMPT], LONG))
    assert embedded.request("GET", "/health_generate")[0] == 503
    assert embedded.request("GET", "/model_info")[0] == 200
    assert "weights" in embedded.refuse("/resume_memory_occupation", {"tags": ["weights"]})
    embedded.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert embedded.generate_one(PROMPT, LONG)["output_ids"] == expected


def test_only_an_idle_engine_gives_memory_back_or_flushes(embedded: EngineUnderTest) -> None:
    embedded.flush()
    with _busy(embedded):
        assert "running" in embedded.refuse("/flush_cache", {})
        assert "running" in embedded.refuse("/release_memory_occupation", {"tags": ["kv_cache"]})
    assert "socks" in embedded.refuse("/release_memory_occupation", {"tags": ["socks"]})
