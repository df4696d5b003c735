"""The owner of an engine: it notices that the engine died or hangs, and says why it cannot be started again."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from recipe.config import Architecture, Config, Resolved
from recipe.engines import process
from recipe.engines.launch import Launch
from recipe.system.errors import UserError
from recipe.system.ports import LOCAL, reserve_port_with
from recipe.weights.tiny import write_tiny_checkpoint

BOUND_S = 90.0


@pytest.fixture
def resolved(tmp_path: Path) -> Resolved:
    write_tiny_checkpoint(tmp_path / "hf", seed=1)
    config = Config.model_validate(
        {
            "model": {"hf_checkpoint": tmp_path / "hf", "bf16": False},
            "data": {"prompt_data": tmp_path / "prompts"},
            "rollout": {
                "engine": "embedded",
                "num_rollout": 1,
                "rollout_batch_size": 1,
                "rollout_max_response_len": 4,
                "rollout_health_check_timeout": 2,
                "update_weight_timeout": 2,
            },
            "optimizer": {"lr": 1e-3},
            "misc": {"runs_dir": tmp_path},
        }
    )
    return Resolved(config, Architecture.from_checkpoint(tmp_path / "hf"), {}, ())


@pytest.fixture
def owner(resolved: Resolved) -> Iterator[Any]:
    from recipe.cluster.engine_actor import EngineActor

    owner = EngineActor(resolved, 0, gpus=())
    yield owner
    owner.stop()


def test_an_engine_that_does_not_generate_between_two_rollouts_is_started_again(owner: Any) -> None:
    address = owner.start()
    pid = owner.process.pid
    assert owner.keep_alive() == address
    assert owner.process.pid == pid
    for number in (signal.SIGSTOP, signal.SIGKILL):
        pid, address = owner.process.pid, owner.process.url
        os.killpg(pid, number)
        began = time.monotonic()
        assert owner.keep_alive() != address
        assert time.monotonic() - began < BOUND_S
        assert owner.process.generates(30)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_engine_gives_its_memory_back_and_takes_it_again_in_two_parts(owner: Any) -> None:
    from recipe.cluster.engine_actor import THE_REST, WEIGHTS

    address = owner.start()
    owner.release_memory()
    assert not owner.process.generates(5)
    assert owner.keep_alive() == address
    assert owner.resume_memory(WEIGHTS) == address
    assert not owner.process.generates(5)
    assert owner.resume_memory(THE_REST) == address
    assert owner.process.generates(5)
    assert owner.resume_memory(WEIGHTS) == address


def test_an_engine_that_hangs_over_its_memory_is_ended_or_started_again(owner: Any) -> None:
    from recipe.cluster.engine_actor import WEIGHTS

    address = owner.start()
    os.killpg(owner.process.pid, signal.SIGSTOP)
    owner.release_memory()
    assert not owner.process.alive
    assert owner.keep_alive() != address
    owner.release_memory()
    os.killpg(owner.process.pid, signal.SIGSTOP)
    address = owner.process.url
    assert owner.resume_memory(WEIGHTS) != address
    assert owner.process.generates(5)


def test_an_engine_that_cannot_be_started_again_is_given_up_with_its_log(
    owner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipe.cluster import engine_actor

    monkeypatch.setattr(engine_actor, "START_ATTEMPTS", 1)
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"engine 0 died and could not be started again in 1 attempts: .*config.json"):
        engine_actor.start_again("engine 0", owner.start)


def test_an_engine_is_started_so_often_and_no_oftener() -> None:
    from recipe.cluster.engine_actor import START_ATTEMPTS, start_again

    def start() -> str:
        attempts.append(len(attempts))
        raise UserError("its port was taken")

    attempts: list[int] = []
    with pytest.raises(UserError, match="in 3 attempts: its port was taken"):
        start_again("engine 0", start)
    assert len(attempts) == START_ATTEMPTS


NEEDS_TWO_PORTS = """
import http.server, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
beside = socket.create_server(("127.0.0.1", port + 1))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has engines run another program in the place of a server."""
    from recipe.cluster import engine_actor

    def run(program: str) -> None:
        monkeypatch.setattr(engine_actor, "launch_of", lambda *_: Launch((sys.executable, "-c", program)))

    return run


def test_an_engine_whose_port_is_taken_starts_on_another_at_the_first_start_too(
    owner: Any, launch: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(NEEDS_TWO_PORTS)
    with socket.create_server((LOCAL, 0)) as taken:
        unlucky: int = taken.getsockname()[1] - 1
        offered = [(unlucky, ExitStack())]
        monkeypatch.setattr(
            process, "reserve_port_with", lambda host, _: offered.pop() if offered else reserve_port_with(host, (1,))
        )
        address = owner.start()
    assert owner.process.generates(5)
    assert address != f"http://{LOCAL}:{unlucky}"
    [line] = caplog.messages
    assert "engine 0 does not start (attempt 1 of 3, is started again): " in line
    assert "says: OSError: [Errno 98] Address already in use" in line


@pytest.mark.parametrize(
    ("words", "starts"), [("ValueError: port at 1 is not available", 3), ("torch.OutOfMemoryError: 60 GiB", 1)]
)
def test_an_engine_that_fails_at_its_first_start_is_tried_again_for_want_of_a_port_only(
    owner: Any, launch: Callable[[str], None], tmp_path: Path, words: str, starts: int
) -> None:
    launch(f"import sys; sys.exit({words!r})")
    with pytest.raises(UserError, match=words):
        owner.start()
    assert len(list((tmp_path / "run" / "logs").iterdir())) == starts


class Update:
    """A weight update to engines "a", "b" and "c", of which some fail, time after time."""

    def __init__(self, *results: dict[str, Any]) -> None:
        from recipe.weight_sync.result import UpdateResult

        self.results = [UpdateResult(**result) for result in results]
        self.urls = ["a", "b", "c"]
        self.sent: list[list[str]] = []

    def send(self, numbers: Sequence[int]) -> Any:
        self.sent.append([self.urls[number] for number in numbers])
        return self.results[len(self.sent) - 1]

    def start_again(self, number: int) -> None:
        self.urls[number] += "2"

    def carry_out(self) -> None:
        from recipe.cluster.engine_group import deliver

        deliver([0, 1, 2], self.send, self.urls, self.start_again)


def test_an_engine_that_fails_over_an_update_is_started_again_and_gets_the_weights() -> None:
    update = Update({"failed": {"b": "it hung"}}, {"failed": {"b2": "it hung again"}}, {})
    update.carry_out()
    assert update.sent == [["a", "b", "c"], ["b2"], ["b22"]]
    assert update.urls == ["a", "b22", "c"]


def test_engines_that_lost_a_broadcast_get_it_again_with_the_one_that_failed() -> None:
    update = Update({"failed": {"c": "it died"}, "incomplete": ("a",)}, {})
    update.carry_out()
    assert update.sent == [["a", "b", "c"], ["a", "c2"]]


def test_an_engine_that_fails_over_every_update_ends_the_run_with_the_reason() -> None:
    update = Update(*({"failed": {"a" + "2" * number: "out of memory"}} for number in range(3)))
    with pytest.raises(UserError, match=r"engine 0 failed in 3 attempts to send it the weights.* out of memory"):
        update.carry_out()
    assert len(update.sent) == 3


def test_an_engine_may_start_at_a_later_attempt() -> None:
    from recipe.cluster.engine_actor import start_again

    failures = iter(["its port was taken"])

    def start() -> str:
        for failure in failures:
            raise UserError(failure)
        return "http://127.0.0.1:1"

    assert start_again("engine 0", start) == "http://127.0.0.1:1"
