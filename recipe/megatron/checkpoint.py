"""Training checkpoints: torch_dist (any layout reads any other's) plus one small file of what is the same on all ranks.

Where they lie, and which is the newest, is told in `recipe.weights.checkpoints`. A directory that crashed half-written
still has its temporary name and is never loaded.
"""

import functools
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
)
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import WriteItem

from recipe.megatron.model import PolicyModel
from recipe.megatron.optimizer import Optimization
from recipe.megatron.optimizer_state import sharded_state
from recipe.messages import Progress
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_bytes, atomic_write_text
from recipe.system.heartbeat import heartbeat
from recipe.weights.checkpoints import PROGRESS, claim, damaged, name_of, note_written, others_that_are_whole
from recipe.weights.table import Part, Placement

Shards = dict[str, list[ShardedBase]]
"""What one rank writes, by parameter; of what several ranks hold, one of them has it."""


def read_progress(checkpoint: Path) -> Progress:
    """The progress file of a checkpoint, which the first rank reads; the others are told its counts. Collective over
    all ranks. Raises UserError, on every rank, if it is damaged."""
    path, progress = checkpoint / PROGRESS, None
    told: list[Progress | None] = [None]
    if dist.get_rank() == 0:
        with suppress(OSError, ValueError, TypeError):
            progress = Progress(**json.loads(path.read_text()))
            told = [progress.counts]
    dist.broadcast_object_list(told, src=0)
    [counts] = told
    if counts is None:
        raise damaged(path)
    return progress or counts


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
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    for part in optimization.parts:
        part.sharded_param_state_fully_reshardable = functools.partial(sharded_state, part)
    state = optimization.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def keep_local(value: Any) -> Any:
        return value if isinstance(value, ShardedBase | LocalNonpersistentObject) else LocalNonpersistentObject(value)

    return dict_list_map_inplace(keep_local, state)


def own_shards(chunks: list[PolicyModel], optimization: Optimization) -> Shards:
    """What this rank writes of a training checkpoint: the weights themselves, and a copy in host memory of the
    optimizer's tensors. Collective over all ranks."""
    model_state = _model_state(chunks)
    return _keep_own({**model_state, "optimizer": _optimizer_state(optimization, model_state, is_loading=False)})


def _keep_own(state: dict[str, Any]) -> Shards:
    sharded, _ = save_preprocess(state)
    own, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return own


def save(
    directory: Path,
    shards: Shards,
    progress: Progress,
    keep: int | None,
    group: dist.ProcessGroup | None = None,
    *,
    beside_others: bool = False,
) -> None:
    """Writes a training checkpoint; of `progress` the first rank's, of which the others need the counts. Older ones
    beyond `keep` go, or stay where it is `beside_others` (see `note_written`). Collective
    over all ranks, in `group` if one is given. Raises OSError or CheckpointException, on every rank, if the disk is
    full; the checkpoints that were there stay."""

    def tell_progress() -> None:
        atomic_write_text(partial / PROGRESS, json.dumps(asdict(progress)))

    def make_it_the_latest() -> None:
        note_written(final, progress.rollouts, keep, beside_others=beside_others)

    final = directory / name_of(progress.rollouts)
    _on_first_rank(lambda: claim(final, None if beside_others else keep), group)
    with written_beside(final, group) as partial:
        _write(partial, shards, group)
        _on_first_rank(tell_progress, group)
    _on_first_rank(make_it_the_latest, group)


def write_hugging_face(directory: Path, pieces: Iterable[tuple[Placement, Part, Tensor]]) -> None:
    """Writes Hugging Face tensors, each as a piece of its parameter, as a torch_dist checkpoint into an empty
    directory. Collective over all ranks, which together bring every piece once."""
    _write(directory, _keep_own({part.hf_name: _piece(placement, part, tensor) for placement, part, tensor in pieces}))


def _piece(placement: Placement, part: Part, tensor: Tensor) -> ShardedTensor:
    """A Hugging Face tensor's place in its whole parameter: experts keep the grid's axes, gate and up projection of
    other MLPs are joined along the first axis."""
    offsets = [(axis, part.index[axis], count) for axis, count in enumerate(placement.grid)]
    grid = (1,) * len(placement.grid) if placement.is_expert else ()
    return ShardedTensor.from_rank_offsets(placement.name, tensor.view(*grid, *tensor.shape), *offsets)


class _BeatingPlanner(MCoreSavePlanner):
    """A heartbeat for every tensor written."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The tensor's data."""
        heartbeat.beat()
        return super().resolve_data(write_item)


def _write(directory: Path, shards: Shards, group: dist.ProcessGroup | None = None) -> None:
    """megatron's torch_dist format written by torch's own writer, a tensor at a time. megatron's copies everything
    first, forks writer processes, and starts another that imports this program again. One thread: torch's writer takes
    no notice of what fails in a second one."""
    # Nobody checks the sums, and computing them takes as long as the rest. The option is the whole process's: whatever
    # is saved while training goes on does without them too.
    for shard in nested_values(shards):
        shard.data = _apart(shard.data)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(
            mcore_to_pyt_state_dict(shards, is_loading=False),
            # Ahead of the writing it copies in the stream that it shares with training, for which it then waits.
            storage_writer=dcp.FileSystemWriter(
                directory, thread_count=1, per_thread_copy_ahead=10_000_000 if group is None else 0
            ),
            planner=_BeatingPlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )
    finally:
        torch.serialization.set_crc32_options(before)
    _on_first_rank(lambda: _write_what_names_the_format(directory), group)


def _apart(tensor: Tensor) -> Tensor:
    """The tensor's memory as a storage of its own, if it is the host's: of a part of a larger one torch writes a
    copy."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    memory = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


def _write_what_names_the_format(directory: Path) -> None:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    atomic_write_bytes(directory / COMMON_STATE_FNAME, nothing.getvalue())
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _on_first_rank(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Rank 0 carries out `action`; the others wait for it. Raises its OSError on every rank."""
    failure: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [error]
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise failure[0]


@contextmanager
def written_beside(final: Path, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """A directory for all ranks to write in, which rank 0 renames to `final` when all are done."""
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def put_in_place() -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    _on_first_rank(begin, group)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    dist.barrier(group)
    _on_first_rank(put_in_place, group)


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
    """Loads weights and optimizer and returns the progress, as `read_progress`."""
    state = _model_state(chunks)
    state["optimizer"] = _optimizer_state(optimization, dict(state), is_loading=True)
    loaded = _read(checkpoint, state)
    _load_into(chunks, loaded)
    optimization.optimizer.load_state_dict(loaded["optimizer"])
    progress = read_progress(checkpoint)
    optimization.set_step_count(progress.optimizer_steps)
    return progress


_UNREADABLE = (
    dist_checkpointing.core.CheckpointingException,
    dcp.api.CheckpointException,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What reading a torch_dist directory raises where files are missing, cut off or something else."""


def _beat(*_: object) -> None:
    heartbeat.beat()


def _read(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        held = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        asked = {tensor.key for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)}
        if absent := sorted(asked - held.keys()):
            raise UserError(
                f"{checkpoint} lacks {len(absent)} tensors that this run asks for, such as {absent[0]}: it was written "
                "for another model, or without --mtp-num-layers 1 or the optimizer (--no-load-optim does without)"
            )
        # The planner is told of every tensor read, and does nothing about it.
        with mock.patch.object(DefaultLoadPlanner, "commit_tensor", _beat):
            return dist_checkpointing.load(state, str(checkpoint), get_default_load_sharded_strategy(str(checkpoint)))
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except _UNREADABLE as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        others = others_that_are_whole(checkpoint)
        cure = f"move it away, and --load goes on from {others[0].name}" if others else "restore it, or convert again"
        raise UserError(f"{checkpoint} is damaged or no torch_dist checkpoint ({reason}): {cure}") from error
