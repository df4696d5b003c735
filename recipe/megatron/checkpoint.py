"""Training checkpoints: torch_dist (any layout reads any other's) plus one small file of what is the same on all ranks.

    DIR/iter_0000010/          one directory a checkpoint, renamed into place when it is whole
    DIR/latest_checkpointed_iteration.txt

A directory that crashed half-written still has its temporary name and is never loaded.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)

from recipe.errors import UserError
from recipe.files import atomic_write_text
from recipe.megatron.model import PolicyModel
from recipe.megatron.optimizer import Optimization
from recipe.messages import Progress

PROGRESS = "progress.json"
LATEST = "latest_checkpointed_iteration.txt"


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint under `directory`, or None."""
    found = sorted(path for path in directory.glob("iter_*") if (path / PROGRESS).exists())
    return found[-1] if found else None


def read_progress(checkpoint: Path) -> Progress:
    """The progress file of a checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text()))


def _metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _model_state(chunks: list[PolicyModel]) -> dict[str, Any]:
    """Sharded weights. `_extra_state` entries are empty without Transformer Engine and left out."""

    def of(chunk: PolicyModel) -> dict[str, Any]:
        state = chunk.sharded_state_dict(metadata=_metadata())
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}

    if len(chunks) == 1:
        return {"model": of(chunks[0])}
    return {f"model{number}": of(chunk) for number, chunk in enumerate(chunks)}


def _optimizer_state(optimization: Optimization, model_state: dict[str, Any], is_loading: bool) -> Any:
    """Sharded optimizer tensors by parameter name, so that TP, PP, EP and DP may differ between save and load. What
    is not a tensor (parameter groups) stays with the process; the step count travels in the progress file."""
    if len(model_state) == 1:
        model_state = model_state["model"]
    metadata = {
        **_metadata(),
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
    }
    state = optimization.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def keep_local(value: Any) -> Any:
        return value if isinstance(value, ShardedBase | LocalNonpersistentObject) else LocalNonpersistentObject(value)

    return dict_list_map_inplace(keep_local, state)


def save(
    directory: Path, chunks: list[PolicyModel], optimization: Optimization, progress: Progress, keep: int | None
) -> None:
    """Writes a training checkpoint. Collective over all ranks. Raises OSError if the disk is full; the checkpoints that
    were there stay."""
    final = directory / f"iter_{progress.rollouts:07d}"
    model_state = _model_state(chunks)
    state = {**model_state, "optimizer": _optimizer_state(optimization, model_state, is_loading=False)}
    with _written_beside(final) as partial:
        dist_checkpointing.save(state, str(partial), get_default_save_sharded_strategy("torch_dist", 1))
        if dist.get_rank() == 0:
            atomic_write_text(partial / PROGRESS, json.dumps(asdict(progress)))
    if dist.get_rank() == 0:
        atomic_write_text(directory / LATEST, f"{progress.rollouts}\n")
        _prune(directory, keep)


def save_weights(directory: Path, chunks: list[PolicyModel]) -> None:
    """Writes the weights alone as a torch_dist checkpoint. Collective over all ranks."""
    with _written_beside(directory) as partial:
        dist_checkpointing.save(_model_state(chunks), str(partial), get_default_save_sharded_strategy("torch_dist", 1))


@contextmanager
def _written_beside(final: Path) -> Iterator[Path]:
    """A directory for all ranks to write in, which rank 0 renames to `final` when all are done."""
    partial = final.with_name(f".{final.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()


def _prune(directory: Path, keep: int | None) -> None:
    if keep is not None:
        for old in sorted(directory.glob("iter_*"))[:-keep]:
            shutil.rmtree(old)


def _load_into(chunks: list[PolicyModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        state = loaded["model"] if len(chunks) == 1 else loaded[f"model{number}"]
        result = chunk.load_state_dict(state, strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys


def load_weights(checkpoint: Path, chunks: list[PolicyModel]) -> None:
    """Loads the weights alone, of whichever layout."""
    state = _model_state(chunks)
    _load_into(chunks, _read(checkpoint, state))


def load(checkpoint: Path, chunks: list[PolicyModel], optimization: Optimization) -> Progress:
    """Loads weights and optimizer and returns the progress."""
    state = _model_state(chunks)
    state["optimizer"] = _optimizer_state(optimization, dict(state), is_loading=True)
    loaded = _read(checkpoint, state)
    _load_into(chunks, loaded)
    optimization.optimizer.load_state_dict(loaded["optimizer"])
    progress = read_progress(checkpoint)
    optimization.set_step_count(progress.optimizer_steps)
    return progress


def _read(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        held = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        asked = {tensor.key for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)}
        if absent := sorted(asked - held.keys()):
            raise UserError(
                f"{checkpoint} lacks {len(absent)} tensors that this run asks for, such as {absent[0]}: it was written "
                "for another model, or without --mtp-num-layers 1 or the optimizer (--no-load-optim does without)"
            )
        return dist_checkpointing.load(state, str(checkpoint), get_default_load_sharded_strategy(str(checkpoint)))
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{checkpoint} cannot be loaded as a torch_dist checkpoint: {error}") from error
