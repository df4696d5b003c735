"""The directory of an evaluation.

settings.json    what the responses depend on; the directory takes no others
samples.jsonl    every finished sample, a line each
sessions.jsonl   when samples were made: seconds, samples and retries of each command
result.json      the result (`evaluation.result`)
report.html      the same to look at, with every response
engine.log       what the engine said, if one was started
.exported-ID/    the exported checkpoint, while samples are missing
.lock            held by the one command that works here
"""

import json
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from evaluation.report import render_report
from evaluation.result import RESULT, Result, Settings
from evaluation.sampling import SampleStore
from recipe.run.journal import Journal, writing
from recipe.system.errors import UserError
from recipe.system.files import FileLock, atomic_write_text
from recipe.system.json_text import read_json

REPORT = "report.html"


class EvaluationDirectory:
    """Where one evaluation keeps what it has. Use as a context manager: leaving it lets another command in."""

    def __init__(self, path: Path, settings: Settings, newest_of: Path | None = None) -> None:
        """Creates the directory, or opens it to go on. Raises UserError if it holds samples of other settings, or if
        another evaluation is at work in it. `newest_of` has checkpoints, the newest of which is the model."""
        self._path = path
        self._newest_of = newest_of
        self.engine_log = path / "engine.log"
        self.exported = path / f".exported-{settings.model_sha256[:12]}"
        """Where a checkpoint is exported to; removed in the end."""
        self._began = time.monotonic()
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(
                path / ".lock",
                f"another evaluation is at work in {path}: wait until it has ended, or choose another --save",
            )
        try:
            self._keep(settings)
            self.store = SampleStore(path / "samples.jsonl", settings.sampling.n_samples)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _keep(self, settings: Settings) -> None:
        path, now = self._path / "settings.json", settings.model_dump(mode="json")
        if path.exists():
            self._refuse_unless_equal(_flat(_read_settings(path)), _flat(now))
            return
        if (self._path / "samples.jsonl").exists() or (self._path / RESULT).exists():
            raise UserError(f"{self._path} holds samples or a result, but no settings.json: choose another --save")
        with writing(path):
            atomic_write_text(path, json.dumps(now, indent=1, ensure_ascii=False) + "\n")

    def _refuse_unless_equal(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """The model may be at another path by now: its hash says whether it is the same."""
        names = sorted({*before, *now} - {"model"})
        name = next((name for name in names if before.get(name) != now.get(name)), None)
        if name == "model_sha256" and self._newest_of is not None:
            self._refuse_another_checkpoint(Path(str(before.get("model"))), Path(now["model"]))
        if name is not None:
            raise UserError(
                f"{self._path} holds the samples of other settings ({name} was {before.get(name)!r} and is "
                f"{now.get(name)!r}): choose another --save"
            )

    def _refuse_another_checkpoint(self, before: Path, now: Path) -> None:
        """Raises UserError if `now` was written since `before` was the newest."""
        assert self._newest_of is not None
        if before.name == now.name:
            return
        first = self._newest_of / before.name
        mend = f"give --checkpoint {first} to go on" if first.is_dir() else f"restore {first}"
        raise UserError(
            f"{self._path} holds the samples of {before.name}, but the newest checkpoint of {self._newest_of} is "
            f"{now.name} by now: {mend}, or choose another --save"
        )

    def record_session(self, samples: int, retries: int) -> None:
        """Takes down what this command generated."""
        session = {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 1),
            "samples": samples,
            "retries": retries,
        }
        Journal(self._path / "sessions.jsonl").append(session)

    def finish(self, result: Result) -> Path:
        """Writes result and report, and removes what was only needed to generate. Returns the report's path."""
        report = self._path / REPORT
        with writing(self._path):
            atomic_write_text(self._path / RESULT, result.model_dump_json(indent=1) + "\n")
            atomic_write_text(report, render_report(result, self.store.samples))
            if self.exported.exists():
                shutil.rmtree(self.exported)
        return report


def _read_settings(path: Path) -> Mapping[str, Any]:
    return read_json(path, dict[str, Any], "restore it, or choose another --save")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
