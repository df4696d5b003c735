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
LONG = {"max_new_tokens": 58, "ignore_eos": True, "sampling_seed": 9}


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


def _running(engine: EngineUnderTest) -> int:
    return int(engine.request("GET", "/server_info")[1]["internal_states"][0]["running"])


def _paused_midway(engine: EngineUnderTest, mode: str, **more: object) -> Background:
    """A long request that was paused before its end."""
    for _ in range(20):
        request = Background(lambda: engine.generate(PROMPT, **LONG | more))
        while request.waits and not _running(engine):
            time.sleep(0.001)
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
    assert _running(engine) == (1 if mode == "in_place" else 0)
    engine.post("/continue_generation")
    assert request.result()["output_ids"] == expected


def test_pausing_with_abort_ends_requests_with_what_they_have(engine: EngineUnderTest) -> None:
    expected = engine.generate(PROMPT, **LONG)["output_ids"]
    request = _paused_midway(engine, "in_place")
    engine.post("/pause_generation", {"mode": "abort"})
    answer = request.result()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
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
    engine.post("/pause_generation", {"mode": "in_place"})
    sampling = {"max_new_tokens": 3, "ignore_eos": True}
    one, other = (
        Background(
            lambda rid=rid: engine.post("/generate", {"input_ids": PROMPT, "rid": rid, "sampling_params": sampling})
        )
        for rid in ("one", "other")
    )
    time.sleep(0.1)
    engine.post("/abort_request", {"rid": "one"})
    assert one.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert one.result()["output_ids"] == []
    assert other.waits
    engine.post("/continue_generation")
    assert len(other.result()["output_ids"]) == 3


def test_abort_all(engine: EngineUnderTest) -> None:
    engine.post("/pause_generation", {"mode": "in_place"})
    requests = [Background(lambda: engine.generate(PROMPT, **LONG)) for _ in range(3)]
    time.sleep(0.1)
    engine.post("/abort_request", {"abort_all": True})
    assert [request.result()["meta_info"]["finish_reason"]["type"] for request in requests] == ["abort"] * 3


def test_a_client_that_leaves_takes_its_request_along(engine: EngineUnderTest) -> None:
    engine.post("/pause_generation", {"mode": "in_place"})
    body = b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 50}}'
    request = urllib.request.Request(engine.url + "/generate", body, {"Content-Type": "application/json"})
    with pytest.raises((TimeoutError, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=0.2)
    deadline = time.monotonic() + 10
    while engine.request("GET", "/server_info")[1]["internal_states"] != [{"running": 0, "waiting": 0}]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_released_memory_refuses_to_generate_until_it_is_resumed(engine: EngineUnderTest) -> None:
    expected = engine.generate(PROMPT, **LONG)["output_ids"]
    engine.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    assert "released" in engine.refuse("/generate", {"input_ids": PROMPT})
    assert "weights" in engine.refuse("/resume_memory_occupation", {"tags": ["weights"]})
    engine.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert engine.generate(PROMPT, **LONG)["output_ids"] == expected


def test_only_an_idle_engine_gives_memory_back_or_flushes(engine: EngineUnderTest) -> None:
    assert "flushed" in engine.post("/flush_cache")
    request = _paused_midway(engine, "in_place")
    assert engine.request("POST", "/flush_cache", {})[0] == 400
    assert "running" in engine.refuse("/release_memory_occupation", {})
    engine.post("/continue_generation")
    assert request.result()["meta_info"]["completion_tokens"] == LONG["max_new_tokens"]
    assert "unknown" in engine.refuse("/release_memory_occupation", {"tags": ["socks"]})
