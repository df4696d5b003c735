"""Metrics for Prometheus: the newest line, under the names of metrics.jsonl."""

import json
import math
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from made_up import step_metrics
from prometheus_client.parser import text_string_to_metric_families

from recipe.config import Resolved
from recipe.run.directory import RunDirectory
from recipe.run.metrics import METRICS
from recipe.run.sinks import PrometheusSink, prometheus_name
from recipe.system.errors import UserError
from recipe.system.ports import reserve_port


@pytest.fixture
def port() -> Iterator[int]:
    """One that nobody else gets meanwhile."""
    with reserve_port() as reservation:
        yield reservation.getsockname()[1]


def listening_at(resolved: Resolved, port: int) -> Resolved:
    """The same run, with its metrics there, and going on from its checkpoints."""
    config = resolved.config
    misc = config.misc.model_copy(update={"metrics_port": port})
    checkpoint = config.checkpoint.model_copy(update={"load": config.save_dir})
    return replace(resolved, config=config.model_copy(update={"misc": misc, "checkpoint": checkpoint}))


def scraped(port: int) -> dict[str, float]:
    """What is served, by name; all of it is of the run `run`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert all(sample.labels == {"run": "run"} for sample in found)
    return {sample.name: sample.value for sample in found}


def expected(line: dict) -> dict[str, float]:
    return {prometheus_name(name): math.nan if value is None else value for name, value in line.items()}


def test_what_is_scraped_is_the_last_line(resolve, port: int) -> None:
    with RunDirectory(listening_at(resolve(), port)) as run:
        run.start(0)
        run.record(step_metrics(1, heldout=0.5))
        run.record(step_metrics(2))
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert scraped(port) == {**expected(lines[0]), **expected(lines[1])}
        listening = [one for one in psutil.Process().net_connections("inet") if one.laddr.port == port]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_every_metric_has_a_name_of_its_own_there() -> None:
    names = [prometheus_name(name) for name in METRICS]
    assert len(set(names)) == len(names)


def test_a_value_that_is_not_finite_is_nan(port: int) -> None:
    sink = PrometheusSink("run", port)
    try:
        sink.log({"step": 1, "loss": None, "eval/a-b_ci95_low": 0.5})
        found = scraped(port)
        assert math.isnan(found.pop("loss"))
        assert found == {"step": 1, "eval_a_b_ci95_low": 0.5}
    finally:
        sink.close()


def test_a_resumed_run_shows_where_it_goes_on(resolve, port: int) -> None:
    resolved = resolve()
    with RunDirectory(resolved) as run:
        run.start(0)
        run.record(step_metrics(1))
    with RunDirectory(listening_at(resolved, port)) as run:
        run.start(1)
        assert scraped(port)["step"] == 1


def test_a_port_that_is_taken_is_a_sentence(resolve) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--metrics-port {port} cannot be listened at"):
            RunDirectory(listening_at(resolve(), port))
