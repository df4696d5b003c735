"""What a step learned from, kept for `recipe.mismatch`: kept_steps/STEP.npz in the run directory.

Letters: N samples, L tokens of a sample, R of its response; M and K as in `recipe.messages`.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.messages import TrainSample
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_bytes

FOLDER = "kept_steps"
NO_VERSION = -1


@dataclass(frozen=True)
class KeptStep:
    """The samples of a step, and under which version of the weights each of their tokens was made."""

    samples: tuple[TrainSample, ...]
    """With tokens, mask, the engine's log-probs and, if they were replayed, its experts."""
    versions: tuple[NDArray[np.int32], ...]
    """[R] of each; NO_VERSION of tokens that no weights made."""


def path_of(run: Path, step: int) -> Path:
    """Where a step of a run is kept."""
    return run / FOLDER / f"{step:06}.npz"


def steps_in(run: Path) -> list[int]:
    """Those that are kept, ascending."""
    return sorted(int(path.stem) for path in (run / FOLDER).glob("*.npz"))


def write_step(run: Path, step: int, kept: KeptStep, newest: int) -> None:
    """Keeps a step, and no more than the `newest`. Raises OSError if it cannot be written."""
    samples = kept.samples
    routed = [sample.routed_experts for sample in samples]
    arrays: dict[str, NDArray[Any]] = {
        "index": np.array([sample.index for sample in samples], dtype=np.int64),
        "lengths": np.array([sample.length for sample in samples], dtype=np.int32),
        "responses": np.array([sample.response_length for sample in samples], dtype=np.int32),
        "tokens": np.concatenate([sample.tokens for sample in samples]).astype(np.int32),
        "loss_mask": np.concatenate([sample.loss_mask for sample in samples]),
        "rollout_log_probs": np.concatenate([_known(sample.rollout_log_probs) for sample in samples]),
        "versions": np.concatenate(kept.versions),
        "routed_rows": np.array([-1 if experts is None else len(experts) for experts in routed], dtype=np.int32),
    }
    if told := [experts for experts in routed if experts is not None]:
        arrays["routed_experts"] = np.concatenate(told)
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # takes names of its own too
    (run / FOLDER).mkdir(exist_ok=True)
    atomic_write_bytes(path_of(run, step), content.getvalue())
    for old in steps_in(run)[:-newest]:
        path_of(run, old).unlink()


def read_step(run: Path, step: int) -> KeptStep:
    """A step that is kept. Raises UserError if it is not, or its file is damaged."""
    path = path_of(run, step)
    if not path.is_file():
        kept = ", ".join(map(str, steps_in(run))) or "none"
        raise UserError(
            f"step {step} of {run} was not kept; those that are: {kept}. A run keeps steps that begin at a checkpoint "
            "(--save-interval), the newest --keep-steps-for-mismatch of them"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _of_arrays(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): look at another step") from error


def _of_arrays(arrays: dict[str, NDArray[Any]]) -> KeptStep:
    lengths, responses, rows = arrays["lengths"], arrays["responses"], arrays["routed_rows"]
    tokens = np.split(arrays["tokens"].astype(np.int64), np.cumsum(lengths)[:-1])
    mask, log_probs, versions = (
        np.split(arrays[name], np.cumsum(responses)[:-1]) for name in ("loss_mask", "rollout_log_probs", "versions")
    )
    routed: list[NDArray[np.uint8] | None] = [None] * len(rows)
    start = 0
    for number, count in enumerate(rows.tolist()):
        if count >= 0:
            routed[number] = arrays["routed_experts"][start : start + count]
            start += count
    samples = [
        TrainSample(
            index=int(index),
            tokens=tokens[number],
            loss_mask=mask[number],
            rollout_log_probs=log_probs[number],
            routed_experts=routed[number],
        )
        for number, index in enumerate(arrays["index"])
    ]
    return KeptStep(tuple(samples), tuple(versions))


def _known(log_probs: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert log_probs is not None
    return log_probs


def kept_step(samples: Sequence[TrainSample], versions: Sequence[Sequence[str]], *, of_engine: bool = True) -> KeptStep:
    """What is kept of a rollout's samples, with the version of each of their response tokens. `of_engine`: their
    experts are the engine's; those of the trainer's own passes are not kept."""
    kept = tuple(samples) if of_engine else tuple(replace(sample, routed_experts=None) for sample in samples)
    return KeptStep(
        kept, tuple(np.array([int(one or NO_VERSION) for one in made], dtype=np.int32) for made in versions)
    )
