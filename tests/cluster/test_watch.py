"""Waiting for ranks that fail in all ways, played by small actors."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from recipe.cluster import EngineGroup, ray_session
from recipe.cluster.engine_group import EngineLife
from recipe.cluster.watch import WatchedCall, WatchedRank
from recipe.config import Config
from recipe.system.errors import UserError

TIMEOUT_S = 6.0
TIMED_OUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"
CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:1234"


@pytest.fixture(scope="module")
def actor() -> Iterator[Any]:
    """An actor class that carries out functions of this file as a rank its verbs."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    class Rank:
        @ray.method(concurrency_group="answers")
        def location(self) -> Any:
            from recipe.system.heartbeat import heartbeat

            return heartbeat.location()

        def do(self, work: Callable[[Callable[[], None]], Any]) -> Any:
            from recipe.system.heartbeat import heartbeat

            heartbeat.follow_this_thread()
            return work(heartbeat.beat)

    cluster = SimpleNamespace(colocate=True, actor_num_gpus_per_node=4, master_addr=None)
    config = SimpleNamespace(cluster=cluster, misc=SimpleNamespace(log_level="warning"), run_dir=Path("build"))
    with ray_session(cast(Config, config), 1 << 28):
        yield ray.remote(concurrency_groups={"answers": 1})(Rank).options(num_cpus=0)


def results(actor: Any, report: Path, *works: Callable[[Callable[[], None]], Any]) -> list[Any]:
    """What a watched call returns in which every rank carries out its own work."""
    import ray

    ranks = [WatchedRank(f"training rank {number}", f"pid {number}", actor.remote()) for number in range(len(works))]
    ray.get([rank.actor.location.remote() for rank in ranks])
    references = [rank.actor.do.remote(work) for rank, work in zip(ranks, works, strict=True)]
    return WatchedCall(ranks, references, TIMEOUT_S, report).results()


def fails(error: Exception, after_s: float) -> Callable:
    def work(_: Callable[[], None]) -> None:
        time.sleep(after_s)
        raise error

    return work


def sleeps(_: Callable[[], None]) -> None:
    time.sleep(600)


def dies(_: Callable[[], None]) -> None:
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(_: Callable[[], None]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def works_slowly(beat: Callable[[], None]) -> str:
    for _ in range(12):
        time.sleep(0.15 * TIMEOUT_S)
        beat()
    return "done"


def waits_long(_: Callable[[], None]) -> str:
    """Though not as long as the other works: to wait for nobody would be to stand still."""
    time.sleep(1.2 * TIMEOUT_S)
    return "waited"


def runs_without_beats(_: Callable[[], None]) -> str:
    def deeper(depth: int) -> str:
        time.sleep(0.01 * TIMEOUT_S)
        return deeper(depth + 1) if depth < 150 else "ran"

    return deeper(0)


def test_ranks_that_advance_may_take_longer_than_the_timeout(actor: Any, tmp_path: Path) -> None:
    assert results(actor, tmp_path / "report", works_slowly, waits_long) == ["done", "waited"]


def test_a_rank_that_moves_without_a_beat_is_at_work(actor: Any, tmp_path: Path) -> None:
    assert results(actor, tmp_path / "report", runs_without_beats) == ["ran"]


def test_a_rank_that_does_not_answer_is_not_waited_for(
    actor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.cluster.watch.ANSWER_TIMEOUT_S", 5.0)
    with pytest.raises(UserError, match=r"^training rank 1 \(pid 1\) does not answer"):
        results(actor, tmp_path / "report", sleeps, is_stopped)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                process.kill()  # else Ray would wait for it in the end


def test_who_gives_up_first_is_not_blamed(actor: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        results(actor, tmp_path / "report", fails(RuntimeError(TIMED_OUT), 0.5), sleeps)
    text = str(told.value)
    assert re.match(r"training rank 1 \(pid 1\) got nothing done", text)
    assert f"training rank 0 gave up: {TIMED_OUT}" in text
    assert "(sleeps)" in text
    assert str(tmp_path / "report") in text
    assert "sleeps" in (tmp_path / "report").read_text()


def test_a_death_that_peers_notice_first_is_told_as_a_death(actor: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training rank 1 died"):
        results(actor, tmp_path / "report", fails(RuntimeError(CLOSED), 0.8), dies)


def test_a_fault_of_the_program_is_raised_as_it_is(actor: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        results(actor, tmp_path / "report", fails(RuntimeError(CLOSED), 0.1), fails(ZeroDivisionError("zero"), 0.5))


def test_a_report_that_cannot_be_written_is_not_promised(actor: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        results(actor, tmp_path / "absent" / "report", sleeps)
    assert re.match(r"training rank 0 \(pid 0\) got nothing done for \d+ s, in ", str(told.value))
    assert "absent" not in str(told.value)


def test_a_hiccup_of_a_side_question_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorUnavailableError

    def get(_: Any) -> None:
        raise ActorUnavailableError("the network hiccups", None)

    fake = SimpleNamespace(wait=lambda references, timeout: (references, []), get=get)
    monkeypatch.setattr("recipe.cluster.watch.ray", fake)
    rank = WatchedRank("training rank 0", "pid 0", cast(Any, None))
    call = WatchedCall([rank], [cast(Any, "step")], TIMEOUT_S, tmp_path / "report")
    call._views[0].question = cast(Any, "where")
    call._take_answers()
    assert call._views[0].question is None, "it is asked again"


def fail_to_start(_: Callable[[], None]) -> None:
    raise UserError("engine 0 cannot have a port")


def be_long_about_it(beat: Callable[[], None]) -> None:
    for _ in range(3000):
        time.sleep(0.1)
        beat()


def test_an_engine_that_does_not_start_is_told_while_ranks_and_other_engines_still_do(
    actor: Any, tmp_path: Path
) -> None:
    import ray

    owners, rank = [actor.remote(), actor.remote()], WatchedRank("training rank 0", "pid 0", actor.remote())
    ray.get([one.location.remote() for one in (*owners, rank.actor)])
    engines = EngineGroup.__new__(EngineGroup)
    rollout = SimpleNamespace(rollout_engine_start_timeout_s=TIMEOUT_S)
    engines._resolved = cast(Any, SimpleNamespace(config=SimpleNamespace(rollout=rollout)))
    engines._engines = [EngineLife(number, owner) for number, owner in enumerate(owners)]
    engines._starting = {0: owners[0].do.remote(be_long_about_it), 1: owners[1].do.remote(fail_to_start)}
    call = WatchedCall([rank], [rank.actor.do.remote(be_long_about_it)], TIMEOUT_S, tmp_path / "report")

    def advance() -> None:
        while not call.advance(at_most_s=0.2):
            assert not engines.have_started()

    with pytest.raises(UserError, match="engine 0 cannot have a port"):
        advance()
    assert ray.wait([call._references[0], engines._starting[0]], timeout=0)[0] == [], "they are waited for"
