"""Pausing, aborting, and giving memory back."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from rollout_support import EngineUnderTest

PROMPT = [7, 3, 9, 11]
LONG = {"max_new_tokens": 58, "ignore_eos": True, "temperature": 0}


class Background:
    """A request that runs beside the test."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        self._result = call()

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(30)
        assert not self.waits
        return self._result


def _paused_midway(engine: EngineUnderTest, mode: str, **more: object) -> Background:
    """A long request that was paused before its end."""
    engine.flush()
    for attempt in range(20):
        request = Background(lambda: engine.generate(PROMPT, **LONG | more))
        time.sleep(0.01 + 0.005 * attempt)
        engine.post("/pause_generation", {"mode": mode})
        time.sleep(0.05)
        if request.waits:
            return request
        engine.post("/continue_generation")
    pytest.fail("the engine is too fast to be paused midway")


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_request_goes_on_as_if_nothing_had_been(engine: EngineUnderTest, mode: str) -> None:
    expected = engine.generate(PROMPT, **LONG)["output_ids"]
    request = _paused_midway(engine, mode)
    engine.post("/continue_generation")
    assert request.result()["output_ids"] == expected


def _ended_midway(engine: EngineUnderTest, end: Callable[[], None], *rids: str, aborted: int = 1) -> list[Any]:
    """Answers to long requests, one for each id, the first `aborted` of which `end` aborted before their end."""
    for attempt in range(20):
        bodies = [{"input_ids": PROMPT, "rid": rid, "return_logprob": True, "sampling_params": LONG} for rid in rids]
        requests = [Background(lambda body=body: engine.post("/generate", body)) for body in bodies]
        time.sleep(0.01 + 0.005 * attempt)
        end()
        engine.post("/continue_generation")
        answers = [request.result() for request in requests]
        if all(answer["meta_info"]["finish_reason"]["type"] == "abort" for answer in answers[:aborted]):
            return answers
    pytest.fail(f"in 20 attempts no {aborted} of {len(rids)} requests were aborted midway")


def test_pausing_with_abort_ends_requests_with_what_they_have(engine: EngineUnderTest) -> None:
    expected = engine.generate(PROMPT, **LONG)["output_ids"]
    [answer] = _ended_midway(engine, lambda: engine.post("/pause_generation", {"mode": "abort"}), "one")
    got = answer["output_ids"]
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(got) < len(expected)
    assert got == expected[: len(got)]


def test_requests_that_come_while_paused_wait(engine: EngineUnderTest) -> None:
    engine.post("/pause_generation")
    request = Background(lambda: engine.generate(PROMPT, max_new_tokens=2, ignore_eos=True))
    time.sleep(0.1)
    assert request.waits
    engine.post("/continue_generation")
    assert len(request.result()["output_ids"]) == 2


def test_abort_by_id_ends_that_request_alone(engine: EngineUnderTest) -> None:
    _, other = _ended_midway(engine, lambda: engine.post("/abort_request", {"rid": "one"}), "one", "other")
    assert other["meta_info"]["finish_reason"] == {"type": "length", "length": LONG["max_new_tokens"]}


def test_abort_all(engine: EngineUnderTest) -> None:
    _ended_midway(engine, lambda: engine.post("/abort_request", {"abort_all": True}), "one", "other", aborted=2)


def test_a_client_that_leaves_takes_its_request_along(embedded: EngineUnderTest) -> None:
    embedded.post("/pause_generation", {"mode": "in_place"})
    body = b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 50}}'
    request = urllib.request.Request(embedded.url + "/generate", body, {"Content-Type": "application/json"})
    with pytest.raises((TimeoutError, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=0.2)
    deadline = time.monotonic() + 10
    while embedded.request("GET", "/server_info")[1]["internal_states"] != [{"running": 0, "waiting": 0}]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_released_memory_refuses_to_generate_until_it_is_resumed(embedded: EngineUnderTest) -> None:
    expected = embedded.generate(PROMPT, **LONG)["output_ids"]
    embedded.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    assert "released" in embedded.refuse("/generate", {"input_ids": PROMPT})
    assert embedded.request("GET", "/health_generate")[0] == 503
    assert embedded.request("GET", "/model_info")[0] == 200
    assert "weights" in embedded.refuse("/resume_memory_occupation", {"tags": ["weights"]})
    embedded.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert embedded.generate(PROMPT, **LONG)["output_ids"] == expected


def test_only_an_idle_engine_gives_memory_back_or_flushes(embedded: EngineUnderTest) -> None:
    assert "flushed" in embedded.post("/flush_cache")
    request = _paused_midway(embedded, "in_place")
    assert embedded.request("POST", "/flush_cache", {})[0] == 400
    assert "running" in embedded.refuse("/release_memory_occupation", {})
    embedded.post("/continue_generation")
    assert request.result()["meta_info"]["completion_tokens"] == LONG["max_new_tokens"]
    assert "unknown" in embedded.refuse("/release_memory_occupation", {"tags": ["socks"]})
