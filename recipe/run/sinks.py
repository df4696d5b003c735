"""Where metrics go besides metrics.jsonl."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tensorboard.summary import Writer

from recipe.config import MiscConfig
from recipe.run.metrics import Scalar
from recipe.system.errors import UserError


class MetricSink(Protocol):
    """Takes the lines of metrics.jsonl as they are written."""

    def log(self, line: Mapping[str, Scalar]) -> None:
        """Takes one line."""

    def close(self) -> None:
        """Writes out what is still held."""


class TensorBoardSink:
    """TensorBoard events in `folder`; shown by `tensorboard --logdir runs`."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(str(folder))

    def log(self, line: Mapping[str, Scalar]) -> None:
        for name, value in line.items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, float(value), int(line["step"] or 0))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run with the run's name; a continued run goes on in it."""

    def __init__(self, misc: MiscConfig, config: Mapping[str, Any]) -> None:
        """`config` is what Weights & Biases shows of the configuration. Raises UserError if wandb is not installed."""
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise UserError(
                "--use-wandb needs the package wandb, which is not installed: run .venv/bin/pip install wandb"
            ) from error
        self._run = wandb.init(
            project=misc.wandb_project,
            group=misc.wandb_group,
            name=misc.name,
            id=misc.name,
            resume="allow",
            config=dict(config),
        )

    def log(self, line: Mapping[str, Scalar]) -> None:
        self._run.log({name: value for name, value in line.items() if value is not None}, step=int(line["step"] or 0))

    def close(self) -> None:
        self._run.finish()
