"""Real SGLang as two processes, as on two machines: one engine, which takes weights and ends as one.

Without DP attention, for which SGLang asks for the same free ports on each machine, and this is one."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import psutil
import pytest
from rollout_support import CONTEXT, EngineUnderTest, Kind, assert_equals_fresh_load, greedy_result, weights_of

from recipe.config import resolve
from recipe.rollout.servers.dist_init import DistInit
from recipe.rollout.servers.launch import Node, SglangServer, launch_sglang
from recipe.rollout.servers.process import LOCAL, EngineProcess
from recipe.rollout.weights_sync import WeightSync

pytestmark = [pytest.mark.slow, pytest.mark.sglang]


@pytest.fixture(scope="module")
def parts(
    sglang_python: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[EngineProcess]]:
    logs = tmp_path_factory.mktemp("parts")
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", str(sglang_python), "--rollout-num-gpus", "2"]
    nodes = ["--actor-num-nodes", "2", "--actor-num-gpus-per-node", "1", "--rollout-num-gpus-per-engine", "2"]
    config = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags, *nodes]).config
    with ExitStack() as stack:
        dist_init = DistInit.open(LOCAL, lambda port: True)
        stack.callback(dist_init.close)
        processes = []
        for rank in range(2):
            node = Node(rank, 2, dist_init.address, LOCAL, {"GLOO_SOCKET_IFNAME": "lo"})
            launch = launch_sglang(
                checkpoint,
                SglangServer.of(config, (), node),
                weight_version="1",
                threads=1,
                context_length=CONTEXT,
                random_seed=7,
            )
            processes.append(stack.enter_context(EngineProcess(launch, logs / str(rank))))
        processes[0].wait_healthy(300, processes[1].check_alive)
        yield processes


@pytest.fixture(scope="module")
def engine(parts: list[EngineProcess], checkpoint: Path) -> EngineUnderTest:
    return EngineUnderTest(parts[0], checkpoint, Kind.SGLANG)


def test_two_processes_answer_as_transformers_does(engine: EngineUnderTest) -> None:
    tokens, log_probs = greedy_result(engine)
    assert len(set(tokens)) > 1
    assert (log_probs > -20).all()
    assert_equals_fresh_load(engine, engine.checkpoint)


def test_they_listen_on_their_machines_address_only(parts: list[EngineProcess]) -> None:
    for part in parts:
        server = psutil.Process(part.pid)
        family = (server, *server.children(recursive=True))
        listening = [c.laddr for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {LOCAL}


@pytest.mark.parametrize("transfer", ["tensor", "distributed", "disk"])
def test_an_update_reaches_both(
    engine: EngineUnderTest, other_checkpoint: Path, transfer: Literal["tensor", "distributed", "disk"]
) -> None:
    sync = WeightSync(transfer=transfer, bucket_bytes=100_000, ranks_per_engine=2, address=LOCAL)
    for checkpoint in (other_checkpoint, engine.checkpoint):
        if transfer == "disk":
            delivery = sync.load_from_disk(checkpoint, [engine.url], transfer)
        else:
            delivery = sync.send(weights_of(checkpoint).items(), [engine.url], transfer)
        assert not delivery.failed
        assert_equals_fresh_load(engine, checkpoint)


def test_the_first_ends_when_the_second_does(parts: list[EngineProcess]) -> None:
    """The last test of this file: it leaves no engine."""
    os.killpg(parts[1].pid, signal.SIGKILL)
    psutil.Process(parts[0].pid).wait(60)
    assert not parts[0].alive
