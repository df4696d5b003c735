"""A run's trainer as one process, and with which weights a step that it kept began."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipe.batching.schedule import schedule
from recipe.config import Architecture, Config
from recipe.config.loading import Setting, build_config
from recipe.config.schema import GROUPS
from recipe.messages import TrainSample
from recipe.system.errors import UserError
from recipe.system.json_text import read_json
from recipe.system.parent_death import end_with_parent
from recipe.weights.checkpoints import find_start, is_training_checkpoint, name_of

if TYPE_CHECKING:
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.policy_rank import PolicyRank
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
    """What a function returns in a process of its own: megatron can be set up once a process. It is killed as soon as
    it has answered: torch's compiler would hold a process that ends up for five minutes. Raises what the function
    raises, and RuntimeError if the process ends without an answer."""
    context = multiprocessing.get_context("spawn")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    try:
        process.start()
        theirs.close()
        result, error = answers.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} ended with status {process.exitcode}") from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
    if error is not None:
        raise error
    answer: T = result
    return answer


def _answer(pipe: Connection, function: Callable[..., object], arguments: tuple) -> None:
    end_with_parent()
    try:
        pipe.send((function(*arguments), None))
    except BaseException as error:  # torch's CheckpointException is no Exception
        told = "".join(traceback.format_exception(error))
        error.add_note(told)
        pipe.send((None, error if _travels(error) else RuntimeError(told)))


def _travels(error: BaseException) -> bool:
    """Whether it arrives as what it is."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


@contextmanager
def trainer_alone(config: Config, architecture: Architecture) -> Iterator["TrainerRank"]:
    """The only rank of a trainer, its weights loaded."""
    from recipe.megatron.rank import TrainerRank

    with _only_rank() as rendezvous:
        rank = TrainerRank(config, architecture, rendezvous)
        rank.load()
        yield rank
        rank.close()


@contextmanager
def policy_alone(config: Config, architecture: Architecture) -> Iterator["PolicyRank"]:
    """The same with nothing but the weights."""
    from recipe.megatron.policy_rank import PolicyRank

    start = find_start(config)
    begun_with = config.checkpoint.ref_load or config.model.hf_checkpoint
    with _only_rank() as rendezvous:
        rank = PolicyRank(config, architecture, rendezvous)
        rank.load_weights(start.checkpoint or start.weights or begun_with)
        yield rank
        rank.close()


@contextmanager
def _only_rank() -> Iterator["Rendezvous"]:
    from torch.distributed import FileStore

    from recipe.megatron.layout import Rendezvous

    with tempfile.TemporaryDirectory() as folder:
        yield Rendezvous(0, 0, 1, FileStore(f"{folder}/store", 1))


def packed(samples: list[TrainSample], config: Config) -> list[list[TrainSample]]:
    """The microbatches of the only rank."""
    [packs] = schedule(
        [sample.length for sample in samples], data_parallel_size=1, max_tokens=config.perf.max_tokens_per_gpu
    )
    return [[samples[number] for number in pack] for pack in packs]
