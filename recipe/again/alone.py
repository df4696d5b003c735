"""A run's trainer as one process, and with which weights a step that it kept began."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipe.batching.schedule import schedule
from recipe.config import Architecture, Config
from recipe.config.loading import Setting, build_config
from recipe.config.schema import GROUPS
from recipe.messages import TrainSample
from recipe.system.errors import UserError
from recipe.system.json_text import read_json
from recipe.weights.checkpoints import is_training_checkpoint, name_of

if TYPE_CHECKING:
    from recipe.megatron.rank import TrainerRank

T = TypeVar("T")

ONE_RANK = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "use_dynamic_batch_size": True,
}
NOWHERE = Path("/nonexistent")
"""Nothing is saved, and no run's own checkpoints are gone on from."""


def read_config(run: Path, changes: dict[str, Setting] | None = None) -> Config:
    """The configuration of a run, with changes by dotted key. Raises UserError if there is none, or a change is none
    that it could have had."""
    path = run / "manifest.json"
    values = read_json(path, dict[str, Any], "give the directory of a run, such as runs/NAME").get("config")
    if not isinstance(values, dict) or not values.keys() <= GROUPS.keys():
        raise UserError(f"{path} is of another version of this recipe: its configuration is not this one's")
    settings: dict[str, Setting] = {}
    for group, fields in values.items():
        known = ((name, value) for name, value in fields.items() if name in GROUPS[group].model_fields)
        settings |= {f"{group}.{name}": Setting(value, str(path)) for name, value in known}
    return build_config(settings | (changes or {}))


def alone(config: Config, weights: Path | None) -> Config:
    """The trainer of a run as one process, which begins with these weights, or with those that the run began with."""
    perf = config.perf
    longest = config.rollout.rollout_max_context_len or config.rollout.rollout_max_response_len
    return with_changes(
        config,
        cluster={"actor_num_nodes": 1, "actor_num_gpus_per_node": 1},
        perf=ONE_RANK | {"max_tokens_per_gpu": perf.max_tokens_per_gpu or longest},
        checkpoint={"load": weights, "save": NOWHERE, "async_save": False},
    )


def with_changes(config: Config, **groups: dict[str, Any]) -> Config:
    """The configuration with fields of some groups changed, unchecked."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    )


def weights_of(config: Config, step: int) -> Path | None:
    """Those that a step of a run began with; None: what the run began with. Raises UserError if they are not there."""
    if step == 1:
        load, own = config.checkpoint.load, config.save_dir
        return None if load is None or load.resolve().is_relative_to(own.resolve()) else load
    checkpoint = config.save_dir / name_of(step - 1)
    if not is_training_checkpoint(checkpoint):
        raise UserError(f"step {step} began with the weights of {checkpoint}, which is not there: look at another step")
    return checkpoint


def in_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a process of its own, which ends with it: megatron can be set up once a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


@contextmanager
def trainer_alone(config: Config, architecture: Architecture) -> Iterator["TrainerRank"]:
    """The only rank of a trainer, its weights loaded."""
    from torch.distributed import FileStore

    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

    with tempfile.TemporaryDirectory() as folder:
        rank = TrainerRank(config, architecture, Rendezvous(0, 0, 1, FileStore(f"{folder}/store", 1)))
        rank.load()
        yield rank
        rank.close()


def packed(samples: list[TrainSample], config: Config) -> list[list[TrainSample]]:
    """The microbatches of the only rank."""
    [packs] = schedule(
        [sample.length for sample in samples], data_parallel_size=1, max_tokens=config.perf.max_tokens_per_gpu
    )
    return [[samples[number] for number in pack] for pack in packs]
