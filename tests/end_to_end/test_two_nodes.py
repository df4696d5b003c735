"""A run over two hosts, by the project's own commands."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from run_support import TinyInputs, arguments, leaves_no_process, metrics, samples, wait_until
from two_hosts import HEAD, WORKER, Host, cut, python, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]

STEPS = 3
LOST_WITHIN_S = 600


@dataclass
class Pair:
    """Two hosts, and the storage that they share."""

    head: Host
    worker: Host
    base: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def begin(self, command: list[str], *flags: str, **more: str) -> tuple[subprocess.Popen, subprocess.Popen]:
        """The launcher on the head and a node that joins, which need not come in this order, with `more` variables in
        the environment of both."""
        words = [word if word != "recipe.train" else "recipe.cluster.launch" for word in command]
        nodes = ["--actor-num-nodes", "2", "--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1", "--master-addr"]
        variables = {"BASE_DIR": str(self.base), "MASTER_ADDR": HEAD, **more}
        joining = self.worker.start(self.base / "join.log", *python("-m", "recipe.cluster.join"), **variables)
        launched = self.head.start(self.base / "head.log", *words, *nodes, HEAD, *flags, **variables)
        self.started += [launched, joining]
        return launched, joining

    def wait_for_step(self, name: str, step: int, launched: subprocess.Popen) -> None:
        """Returns when the run has recorded `step`, or is over."""
        path = self.base / name / "metrics.jsonl"
        wait_until(lambda: launched.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") > step))

    def log(self, name: str) -> str:
        """Of head or join."""
        return (self.base / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("shared")
    with two_hosts() as (head, worker), leaves_no_process(str(base)):
        pair = Pair(head, worker, base)
        yield pair
        for process in pair.started:
            process.terminate()


def test_two_hosts_take_the_steps_of_one(pair: Pair, inputs: TinyInputs, uninterrupted: Path) -> None:
    launched, joining = pair.begin(arguments(inputs, pair.base, "two", "--num-rollout", str(STEPS)))
    assert launched.wait(900) == 0, pair.log("head")
    assert joining.wait(240) == 0, pair.log("join")
    assert metrics(pair.base / "two") == metrics(uninterrupted)[: STEPS + 1]
    assert samples(pair.base / "two") == samples(uninterrupted)[: STEPS * 16]


def assert_own_servers_listen_on_the_nodes_address_only(pair: Pair) -> None:
    """The engine does; the ranks too, but for a port that Ray opens in each of its processes on every address."""
    kinds = {"recipe.engines.embedded": set(), "ray::RankActor": set(), "dashboard/dashboard.py": set()}
    for host in (pair.head, pair.worker):
        for pid, addresses in host.listening().items():
            with suppress(psutil.NoSuchProcess):
                words = " ".join(psutil.Process(pid).cmdline())
                for found in (found for kind, found in kinds.items() if kind in words):
                    found |= addresses
    engine, ranks, dashboard = kinds.values()
    assert engine in ({HEAD}, {WORKER})
    assert ranks - {"*"} == {HEAD, WORKER}
    assert "127.0.0.1" in dashboard


def assert_strangers_are_refused(pair: Pair) -> None:
    """Without the token nobody joins, submits a job or speaks to Ray."""
    join = pair.worker.run(*python("-m", "ray.scripts.scripts", "start", f"--address={HEAD}:6379"))
    assert join.returncode != 0
    client = "from ray.job_submission import JobSubmissionClient as C; C('http://127.0.0.1:8265')"
    submitted = pair.head.run(*python("-c", f"{client}.submit_job(entrypoint='id')"))
    assert submitted.returncode != 0
    assert "token" in submitted.stderr
    with_wrong = pair.worker.run(
        *python("-c", f"from ray._raylet import GcsClient; GcsClient(address='{HEAD}:6379')"),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0" * 64,
    )
    assert with_wrong.returncode != 0


def test_a_node_that_is_cut_off_is_named(pair: Pair, inputs: TinyInputs) -> None:
    impatient = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}  # Ray's own take a minute
    launched, joining = pair.begin(arguments(inputs, pair.base, "cut", "--num-rollout", "1000"), **impatient)
    pair.wait_for_step("cut", 1, launched)
    assert_own_servers_listen_on_the_nodes_address_only(pair)
    assert_strangers_are_refused(pair)
    cut(pair.head)
    assert launched.wait(LOST_WITHIN_S) == 2, pair.log("head")
    assert f"error: the node {WORKER} is lost" in pair.log("head")
    assert "Traceback" not in pair.log("head")
    joining.wait(LOST_WITHIN_S)
