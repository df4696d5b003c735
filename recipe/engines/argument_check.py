"""SGLang's own parser, asked whether the `--sglang-*` arguments are right, in a process of its own: importing it takes
up to 20 seconds, in which there is other work to do."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from recipe.config import Resolved
from recipe.config.error_text import did_you_mean, refuse
from recipe.config.flags import SGLANG_PREFIX
from recipe.config.sglang_rules import find_sglang_python
from recipe.system.errors import UserError
from recipe.system.parent_death import die_with

TIMEOUT_S = 300.0
_ASK = Path(__file__).with_name("ask_sglang.py")


class ArgumentCheck:
    """A question to SGLang's parser, if SGLang is the engine and installed. Use as a context manager: entering it asks
    without waiting, leaving it before the answer is there gives the question up."""

    def __init__(self, resolved: Resolved) -> None:
        self._config, self._left_out = resolved.config, resolved.sglang_left_out
        self._python = find_sglang_python(resolved.config.rollout.rollout_engine_python)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        words = self._config.sglang.command_line()
        asks = words or self._left_out or self._config.rollout.update_weight_in_flight
        if self._config.rollout.engine == "embedded" or not asks or self._python is None:
            return self
        self._deadline = time.monotonic() + TIMEOUT_S
        self._answer, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        parent = os.getpid()
        try:
            self._process = subprocess.Popen(
                [str(self._python), str(_ASK), "--model-path", str(self._config.model.hf_checkpoint), *words],
                stdin=subprocess.DEVNULL,
                stdout=self._answer,
                stderr=self._errors,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        except OSError as error:
            raise self._unanswered(str(error)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answer.close()
        self._errors.close()

    def finish(self) -> None:
        """Waits for the answer. Raises UserError, with all that is wrong, if SGLang's parser does not accept the
        arguments, or cannot be asked."""
        if self._process is None:
            return
        try:
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self._unanswered(f"no answer in {TIMEOUT_S:g} s") from None
        if status:
            raise self._unanswered(_read(self._errors).strip() or f"it ended with status {status}")
        answer = json.loads(_read(self._answer).splitlines()[-1])
        known = [SGLANG_PREFIX + flag.removeprefix("--") for flag in answer["known"]]
        refuse([*_of_given(answer, known), *_of_left_out(self._left_out, known), *self._of_versions(answer)])

    def _of_versions(self, answer: dict[str, object]) -> Iterator[str]:
        in_flight = self._config.rollout.update_weight_in_flight
        if in_flight is not None and not answer["tells_versions"]:
            yield (
                f"--update-weight-in-flight {in_flight}: the SGLang of {self._python} does not tell the weight version "
                "of each token, only one of a whole response; use SGLang 0.5.21, or leave it out"
            )

    def _unanswered(self, reason: str) -> UserError:
        return UserError(
            f"SGLang's arguments cannot be checked with {self._python} (--rollout-engine-python): "
            f"{reason.splitlines()[-1]}"
        )


def check_arguments(resolved: Resolved) -> None:
    """Asks and waits. Raises UserError as `ArgumentCheck.finish` does."""
    with ArgumentCheck(resolved) as check:
        check.finish()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _of_given(answer: dict[str, object], known: Sequence[str]) -> Iterator[str]:
    if "error" in answer:
        yield f"SGLang refuses the --sglang-* arguments (named here without the prefix): {answer['error']}"
        return
    unknown = answer["unknown"]
    assert isinstance(unknown, list)
    flags = [SGLANG_PREFIX + word.removeprefix("--") for word in unknown if word.startswith("--")]
    for flag in flags:
        yield f"{flag}: SGLang has no such argument{did_you_mean(flag, known)}"
    if unknown and not flags:
        yield f"SGLang takes fewer values than the --sglang-* arguments give; {' '.join(unknown)!r} is too much"


def _of_left_out(names: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    for name in names:
        flag, opposite = (SGLANG_PREFIX + prefix + name.replace("_", "-") for prefix in ("", "no-"))
        if flag not in known:
            yield f"{flag} false: SGLang has no such argument{did_you_mean(flag, known)}"
        elif opposite in known:
            yield f"{flag} false leaves SGLang's own default as it is; {opposite} turns it off"
