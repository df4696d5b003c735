"""The group owns its engines' lives: it finds out that one is dead, starts it again, and says why it gives one up."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from local_engines import local_group

from recipe.cluster import engine_actor
from recipe.cluster.calls import ActorDied
from recipe.cluster.engine_actor import THE_REST, WEIGHTS, EngineActor, EngineEnded
from recipe.cluster.engine_group import STARTS_IN_A_ROW, EngineGroup
from recipe.cluster.trainer_group import TrainerGroup
from recipe.config import Architecture, Config, Resolved
from recipe.engines import process
from recipe.engines.launch import Launch
from recipe.system.errors import UserError
from recipe.system.ports import LOCAL, reserve_port_with
from recipe.weight_sync.result import UpdateResult
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
            "cluster": {"colocate": True},
        }
    )
    return Resolved(config, Architecture.from_checkpoint(tmp_path / "hf"), {}, ())


@pytest.fixture
def group(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineGroup]:
    """One embedded engine, carried by this process, as on GPUs that it shares with the trainer."""
    with local_group(resolved, lambda number: EngineActor(resolved, number, gpus=()), monkeypatch) as group:
        yield group


def carried(group: EngineGroup) -> Any:
    """The actor of the group's engine."""
    return group._engines[0].actor.carried


def start(group: EngineGroup) -> str:
    group.begin_start()
    [url] = group.finish_start()
    return url


class FakeTrainer:
    """Tells of one update after the other what a test says, and then that all went well."""

    def __init__(self, *results: UpdateResult) -> None:
        self.results = list(results)
        self.sent: list[dict[int, str]] = []
        """The engines' addresses by number, at each update."""

    def update_weights(self, engines: Mapping[int, str], version: str) -> UpdateResult:
        self.sent.append(dict(engines))
        return self.results.pop(0) if self.results else UpdateResult()


def update(group: EngineGroup, trainer: FakeTrainer | None = None) -> list[str]:
    return group.update_weights(cast(TrainerGroup, trainer or FakeTrainer()), 1)


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Does all that it is told, until it hangs or dies."""
NEEDS_TWO_PORTS = (
    """
import socket, sys
beside = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]) + 1))
"""
    + SERVER
)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has engines run another program in the place of a server."""

    def run(program: str) -> None:
        monkeypatch.setattr(engine_actor, "launch_of", lambda *_: Launch((sys.executable, "-c", program)))

    return run


def test_an_engine_that_does_not_generate_between_two_rollouts_is_started_again(
    group: EngineGroup, launch: Callable[[str], None]
) -> None:
    launch(SERVER)
    url = start(group)
    pid = carried(group).process.pid
    assert update(group) == [url]
    assert carried(group).process.pid == pid
    for number in (signal.SIGSTOP, signal.SIGKILL):
        pid, [url] = carried(group).process.pid, group.urls
        os.killpg(pid, number)
        began, trainer = time.monotonic(), FakeTrainer()
        assert update(group, trainer) != [url]
        assert trainer.sent == [{0: group.urls[0]}]
        assert time.monotonic() - began < BOUND_S
        assert carried(group).process.generates(30)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("in_flight", "works"), [(None, False), ("keep", True)])
def test_an_engine_that_is_watched_while_it_generates_has_only_to_answer(in_flight: str | None, works: bool) -> None:
    """It may be compiling, or be at a long prompt, and whoever waits for its samples finds out whether it is dead."""
    rollout = SimpleNamespace(rollout_health_check_timeout=1.0, update_weight_in_flight=in_flight)
    engine = SimpleNamespace(
        process=SimpleNamespace(answers=lambda _: True, generates=lambda _: False),
        nodes=SimpleNamespace(are_alive=lambda: True),
        released=False,
        resolved=SimpleNamespace(config=SimpleNamespace(rollout=rollout)),
    )
    assert EngineActor.works(cast(EngineActor, engine)) is works


def test_an_engine_gives_its_memory_back_and_takes_it_again_in_two_parts(group: EngineGroup) -> None:
    url = start(group)
    engine = carried(group)
    group.release_memory()
    assert not engine.process.generates(5)
    assert engine.works()
    assert engine.resume_memory(WEIGHTS)
    assert not engine.process.generates(5)
    assert engine.resume_memory(THE_REST)
    assert engine.process.generates(5)
    assert engine.resume_memory(WEIGHTS)
    assert update(group) == [url]


def test_an_engine_that_hangs_over_its_memory_is_ended_or_started_again(
    group: EngineGroup, launch: Callable[[str], None]
) -> None:
    launch(SERVER)
    url = start(group)
    os.killpg(carried(group).process.pid, signal.SIGSTOP)
    group.release_memory()
    assert not carried(group).process.alive
    assert update(group) != [url]
    group.release_memory()
    os.killpg(carried(group).process.pid, signal.SIGSTOP)
    [url] = group.urls
    assert group._resume_memory(WEIGHTS) == [0]
    assert group.urls != [url]
    assert carried(group).process.generates(5)


def test_an_engine_whose_port_is_taken_starts_on_another_at_the_first_start_too(
    group: EngineGroup, launch: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(NEEDS_TWO_PORTS)
    with socket.create_server((LOCAL, 0)) as taken:
        unlucky: int = taken.getsockname()[1] - 1
        offered = [(unlucky, ExitStack())]
        monkeypatch.setattr(
            process, "reserve_port_with", lambda host, _: offered.pop() if offered else reserve_port_with(host, (1,))
        )
        address = start(group)
    assert carried(group).process.generates(5)
    assert address != f"http://{LOCAL}:{unlucky}"
    [line] = caplog.messages
    assert line.startswith("engine 0 does not start (")
    assert "says: OSError: [Errno 98] Address already in use" in line
    assert line.endswith("): it is started again (2 of 3)")


@pytest.mark.parametrize(
    ("words", "starts"), [("ValueError: port at 1 is not available", 3), ("torch.OutOfMemoryError: 60 GiB", 1)]
)
def test_an_engine_that_fails_at_its_first_start_is_tried_again_for_want_of_a_port_only(
    group: EngineGroup, launch: Callable[[str], None], tmp_path: Path, words: str, starts: int
) -> None:
    launch(f"import sys; sys.exit({words!r})")
    with pytest.raises(UserError, match=words):
        start(group)
    assert len(list((tmp_path / "run" / "logs").iterdir())) == starts


class FakeEngine:
    """An actor whose starts fail with one sentence after the other, and then go well."""

    def __init__(self, number: int) -> None:
        self.number, self.starts = number, 0
        self.failures: list[str] = []
        self.works: Callable[[], bool] = lambda: True
        self.continued, self.continues = 0, True

    def continue_generation(self) -> bool:
        self.continued += 1
        return self.continues

    def start(self) -> str:
        self.starts += 1
        self.continues = True
        if self.failures:
            raise UserError(self.failures.pop(0))
        return f"engine-{self.number}-start-{self.starts}"

    def stop(self) -> None:
        pass


@pytest.fixture
def fakes(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> EngineGroup:
    """Three engines that have taken weights, and then answered."""
    cluster = resolved.config.cluster.model_copy(update={"rollout_num_gpus": 3, "colocate": False})
    config = resolved.config.model_copy(update={"cluster": cluster})
    group = local_group(replace(resolved, config=config), FakeEngine, monkeypatch)
    group.begin_start()
    group.finish_start()
    update(group)
    for number in range(3):
        group.on_answer(number)
    return group


def starts(group: EngineGroup) -> list[int]:
    return [engine.actor.carried.starts for engine in group._engines]


GIVEN_UP = "it has been started 3 times in a row and has not worked since; see its logs in "


async def test_a_silent_engine_that_cannot_be_started_again_is_given_up_after_three_starts(fakes: EngineGroup) -> None:
    fakes._engines[1].actor.carried.failures = ["its GPU is gone"] * 9
    with pytest.raises(UserError, match=rf"^engine 1 does not start \(its GPU is gone\): {GIVEN_UP}.*logs$"):
        await fakes.on_silent(1)
    assert starts(fakes) == [1, 1 + STARTS_IN_A_ROW, 1]


async def test_a_silent_engine_may_start_at_a_later_attempt_and_gets_the_weights(fakes: EngineGroup) -> None:
    trainer = FakeTrainer()
    update(fakes, trainer)
    fakes._engines[1].actor.carried.failures = ["its port was taken", "and again"]
    assert await fakes.on_silent(1) == "engine-1-start-4"
    assert trainer.sent[1:] == [{1: "engine-1-start-4"}]
    assert fakes.urls == ["engine-0-start-1", "engine-1-start-4", "engine-2-start-1"]


async def test_an_engine_that_works_in_between_may_die_as_often_as_it_will(fakes: EngineGroup) -> None:
    for _ in range(2 * STARTS_IN_A_ROW):
        await fakes.on_silent(0)
        fakes.on_answer(0)
    assert starts(fakes) == [1 + 2 * STARTS_IN_A_ROW, 1, 1]


async def test_an_engine_that_takes_weights_and_never_answers_is_given_up(fakes: EngineGroup) -> None:
    for _ in range(STARTS_IN_A_ROW):
        await fakes.on_silent(0)
    with pytest.raises(UserError, match=rf"engine 0 does not generate any more: {GIVEN_UP}"):
        await fakes.on_silent(0)


def test_an_engine_that_fails_over_an_update_is_started_again_and_gets_the_weights(fakes: EngineGroup) -> None:
    trainer = FakeTrainer(UpdateResult({1: "it hung"}), UpdateResult({1: "it hung again"}))
    urls = update(fakes, trainer)
    assert trainer.sent == [
        {0: "engine-0-start-1", 1: "engine-1-start-1", 2: "engine-2-start-1"},
        {1: "engine-1-start-2"},
        {1: "engine-1-start-3"},
    ]
    assert urls == ["engine-0-start-1", "engine-1-start-3", "engine-2-start-1"]


def test_engines_that_lost_a_broadcast_get_it_again_before_the_one_that_failed(fakes: EngineGroup) -> None:
    trainer = FakeTrainer(UpdateResult({2: "it died"}, incomplete=(0, 1)), UpdateResult({1: "too"}, incomplete=(0,)))
    update(fakes, trainer)
    assert trainer.sent[1:] == [
        {0: "engine-0-start-1", 1: "engine-1-start-1"},
        {0: "engine-0-start-1"},
        {1: "engine-1-start-2", 2: "engine-2-start-2"},
    ]


@pytest.fixture
def in_flight(fakes: EngineGroup) -> EngineGroup:
    """They generate while weights come."""
    config = fakes._resolved.config
    rollout = config.rollout.model_copy(update={"update_weight_in_flight": "recompute"})
    fakes._resolved = replace(fakes._resolved, config=config.model_copy(update={"rollout": rollout}))
    return fakes


def continued(group: EngineGroup) -> list[int]:
    return [engine.actor.carried.continued for engine in group._engines]


def test_engines_that_stood_still_go_on_when_all_have_everything_and_tell_how_long_it_was(
    in_flight: EngineGroup,
) -> None:
    trainer = FakeTrainer(UpdateResult({2: "it died"}, incomplete=(0,), paused_s=5.0), UpdateResult(paused_s=3.0))
    update(in_flight, trainer)
    assert len(trainer.sent) == 3
    assert continued(in_flight) == [1, 1, 1]  # the last one when it was started again, and had them
    assert in_flight.seconds_paused is not None
    assert in_flight.seconds_paused >= 5


def test_an_engine_that_does_not_go_on_is_started_again_and_gets_the_weights(in_flight: EngineGroup) -> None:
    in_flight._engines[1].actor.carried.continues = False
    trainer = FakeTrainer()
    assert update(in_flight, trainer) == ["engine-0-start-1", "engine-1-start-2", "engine-2-start-1"]
    assert trainer.sent[1:] == [{1: "engine-1-start-2"}]
    assert continued(in_flight) == [1, 2, 1]


def test_engines_go_on_though_the_trainer_fails_in_the_midst_of_an_update(in_flight: EngineGroup) -> None:
    class FailingTrainer(FakeTrainer):
        def update_weights(self, engines: Mapping[int, str], version: str) -> UpdateResult:
            raise ActorDied("training rank 0 died")

    with pytest.raises(ActorDied):
        update(in_flight, FailingTrainer())
    assert continued(in_flight) == [1, 1, 1]


def test_engines_with_nothing_under_way_are_not_told_to_go_on(fakes: EngineGroup) -> None:
    update(fakes)
    assert continued(fakes) == [0, 0, 0]
    assert fakes.seconds_paused is None


def test_an_engine_that_fails_over_every_update_ends_the_run_with_the_reason(fakes: EngineGroup) -> None:
    trainer = FakeTrainer(*[UpdateResult({0: "out of memory"})] * 9)
    with pytest.raises(UserError, match=rf"engine 0 failed while it was sent weights \(out of memory\): {GIVEN_UP}"):
        update(fakes, trainer)
    assert starts(fakes) == [1 + STARTS_IN_A_ROW, 1, 1]


@pytest.mark.parametrize("first", [[], [UpdateResult({2: "it died"}, incomplete=(0,))]])
def test_an_engine_that_is_well_and_takes_no_weights_ends_the_run_at_once(
    fakes: EngineGroup, first: list[UpdateResult]
) -> None:
    trainer = FakeTrainer(*first, UpdateResult(incomplete=(1,), refused={0: "engine 0 has no room"}))
    with pytest.raises(UserError, match=r"^engine 0 has no room$"):
        update(fakes, trainer)
    assert len(trainer.sent) == 1 + len(first)
    assert starts(fakes) == [1, 1, 1]


def test_an_engine_that_died_with_its_actor_is_started_by_another(fakes: EngineGroup) -> None:
    def dies() -> bool:
        raise ActorDied("engine 2 died")

    dead = fakes._engines[2].actor
    dead.carried.works = dies
    assert update(fakes) == ["engine-0-start-1", "engine-1-start-1", "engine-2-start-1"]
    assert fakes._engines[2].actor is not dead
    assert starts(fakes) == [1, 1, 1]


def test_engines_that_died_together_start_at_the_same_time(fakes: EngineGroup) -> None:
    both = threading.Barrier(2)

    def start() -> str:
        both.wait(60)
        return "again"

    for engine in fakes._engines[1:]:
        engine.actor.carried.works, engine.actor.carried.start = lambda: False, start
    assert update(fakes) == ["engine-0-start-1", "again", "again"]


def test_who_starts_an_engine_of_a_run_that_is_over_is_told(fakes: EngineGroup) -> None:
    fakes.begin_end()
    with pytest.raises(EngineEnded):
        update(fakes, FakeTrainer(UpdateResult({0: "it was ended"})))


async def test_an_engine_that_dies_while_the_trainer_works_gets_the_new_weights_and_none_half_made(
    fakes: EngineGroup,
) -> None:
    told: list[tuple[str, str]] = []

    class Learning(FakeTrainer):
        weights = "old"

        def update_weights(self, engines: Mapping[int, str], version: str) -> UpdateResult:
            told.append((self.weights, version))
            return super().update_weights(engines, version)

    dies = fakes._engines[1].actor.carried
    start, has_started = dies.start, threading.Event()

    def starts_again() -> str:
        url = start()
        has_started.set()
        return url

    dies.start = starts_again
    trainer = Learning()
    update(fakes, trainer)
    async with fakes.changing(2):
        silent = asyncio.create_task(fakes.on_silent(1))
        trainer.weights = "half"
        assert await asyncio.to_thread(has_started.wait, 60)
        await asyncio.sleep(0.1)  # in which it could be sent what the trainer has
        assert starts(fakes) == [1, 2, 1]
        trainer.weights = "new"
    assert await silent == "engine-1-start-2"
    assert told == [("old", "1"), ("new", "2")]
