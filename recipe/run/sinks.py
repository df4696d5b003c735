"""Where metrics go besides metrics.jsonl."""

import logging
import math
import re
import secrets
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from tensorboard.summary import Writer

from recipe.config import MiscConfig
from recipe.run.metrics import Values, metric_of
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text
from recipe.system.threads import signals_left_to_the_others

logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


class MetricSink(Protocol):
    """Takes the lines of metrics.jsonl as they are written."""

    def log(self, line: Values) -> None:
        """Takes one line."""

    def close(self) -> None:
        """Writes out what is still held."""


class TensorBoardSink:
    """TensorBoard events in `folder`; shown by `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(str(folder))

    def log(self, line: Values) -> None:
        for name, value in line.items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, float(value), int(line["step"] or 0))

    def close(self) -> None:
        self._writer.close()


class PrometheusSink:
    """The newest line for Prometheus to scrape, at a port of this machine's own address: each metric under its name,
    what Prometheus does not take in one replaced by `_`, with the label `run`."""

    def __init__(self, run: str, port: int) -> None:
        """Raises UserError if the port is taken."""
        self._run, self._registry = run, CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            with signals_left_to_the_others():
                self._server, self._thread = start_http_server(port, LOOPBACK, self._registry)
        except OSError as error:
            raise UserError(f"--metrics-port {port} cannot be listened at ({error.strerror}): give another") from error

    def log(self, line: Values) -> None:
        for name, value in line.items():
            known = prometheus_name(name)
            if known not in self._gauges:
                self._gauges[known] = Gauge(known, metric_of(name).sentence, ["run"], registry=self._registry)
            self._gauges[known].labels(self._run).set(math.nan if value is None else value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def prometheus_name(name: str) -> str:
    """The name of a metric at Prometheus."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


class WandbSink:
    """A Weights & Biases run with the run's name, which a continued run goes on in; another run of an old name is
    another one there too. What fails after the start is told once, and ends nothing."""

    def __init__(self, misc: MiscConfig, config: Mapping[str, Any], identity: Path) -> None:
        """`config` is what Weights & Biases shows of the configuration; the file `identity` keeps the run's id there,
        and what it writes itself lies beside that. Raises UserError if wandb is not installed or does not start, as
        without a key."""
        if not identity.exists():
            atomic_write_text(identity, f"{misc.name}-{secrets.token_hex(4)}\n")
        wandb = import_wandb()
        try:
            self._run: Any = wandb.init(
                project=misc.wandb_project,
                group=misc.wandb_group,
                name=misc.name,
                id=identity.read_text().strip(),
                resume="allow",
                dir=identity.parent,
                config=dict(config),
            )
        except Exception as error:
            raise UserError(
                f"--use-wandb: Weights & Biases does not start ({_first_line(error)}): set WANDB_API_KEY, or "
                "WANDB_MODE=offline and synchronise later"
            ) from error
        self._lost = False

    def log(self, line: Values) -> None:
        values = {name: value for name, value in line.items() if value is not None}
        self._try(lambda: self._run.log(values, step=int(line["step"] or 0)))

    def close(self) -> None:
        self._try(self._run.finish)

    def _try(self, action: Callable[[], object]) -> None:
        """Does nothing any more once something has failed."""
        if self._lost:
            return
        try:
            action()
        except Exception as error:
            self._lost = True
            logger.warning("Weights & Biases gets no more metrics (%s); metrics.jsonl has all", _first_line(error))


def import_wandb() -> Any:
    """The package. Raises UserError if it is not installed."""
    try:
        return import_module("wandb")
    except ImportError as error:
        raise UserError(
            "--use-wandb needs the package wandb, which the image has and this environment has not: "
            ".venv/bin/python -m pip install wandb"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
