"""The slice of a model that `make tune MEASURE=1` trains, and the processes that do such work together."""

import math
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, Store

from recipe.config import Resolved, sglang_rules
from recipe.config.checks import problems_of
from recipe.engines.launch import POLLING_PROCESSES
from recipe.messages import StepReport
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.options import PUBLISHED, resolve_without_weights
from recipe.smoke import together, training
from recipe.smoke.random_model import Load, random_weights
from recipe.system.errors import UserError
from recipe.system.threads import threads_each
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.tiny import write_tiny_checkpoint

RECIPES = ("glm4.7-flash-8gpu", "glm4.7-flash-8gpu-mtp", "glm4.7-flash-16gpu", "glm4.7-flash-24gpu-async")
H100 = Machine.described("H100", 8, "1TB", None, 2.5)


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


@cache
def resolved_of(recipe: str, *flags: str) -> Resolved:
    return resolve_without_weights(["--recipe", recipe, "--hf-checkpoint", str(PUBLISHED), *flags])


@given(
    recipe=st.sampled_from(RECIPES),
    gpus=st.sampled_from([1, 2, 3, 4, 8]),
    sizes=st.tuples(*[st.sampled_from([1, 2, 4])] * 4),
    moe_layers=st.integers(1, 5),
)
def test_a_slice_suits_the_gpus_that_are_here(
    recipe: str, gpus: int, sizes: tuple[int, int, int, int], moe_layers: int
) -> None:
    """Whatever the run's layout: no rule of the trainer's refuses it, nothing of the model's widths changes, and all
    GPUs are busy."""
    resolved = resolved_of(recipe)
    names = ("tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
    asked = dict(zip((*names, "expert_tensor_parallel_size"), sizes, strict=True))
    asked |= {"sequence_parallel": sizes[0] > 1}
    perf = resolved.config.perf.model_copy(update=asked)
    run = replace(resolved, config=resolved.config.model_copy(update={"perf": perf}))
    part = training.slice_of(run, gpus, moe_layers)
    config, here = part.config, part.config.perf
    assert config.world_size == gpus
    assert config.data_parallel_size * here.tensor_model_parallel_size * here.context_parallel_size == gpus
    assert all(size % getattr(here, name) == 0 for name, size in asked.items() if name != "sequence_parallel")
    engine = config.sglang.model_copy(update={"rollout_num_gpus_per_engine": 1, "args": {}})
    batch = {"global_batch_size": config.data_parallel_size, "rollout_batch_size": config.data_parallel_size}
    rollout = config.rollout.model_copy(update=batch)
    alone = config.model_copy(update={"sglang": engine, "rollout": rollout})
    assert [one for one in problems_of(alone, part.architecture) if "parallel" in one or "layers" in one] == []
    assert part.architecture.num_hidden_layers == 1 + moe_layers
    assert part.architecture.model_copy(update={"num_hidden_layers": 47}) == run.architecture
    assert not config.mtp.mtp_num_layers
    assert (here.recompute_granularity, here.max_tokens_per_gpu) == (
        perf.recompute_granularity,
        perf.max_tokens_per_gpu,
    )


def layers_that_fit(gpu_gib: float, host_memory: str, *flags: str) -> int:
    machine = Machine.described(f"H100={gpu_gib}", 1, host_memory, None, 2.5)
    part = training.slice_that_fits(resolved_of("glm4.7-flash-8gpu", *flags), machine)
    return sum(part.architecture.moe_layer_freq)


def test_fewer_layers_are_taken_where_memory_is_short() -> None:
    """Of a GPU, or of the machine, which has the optimizer's state."""
    assert layers_that_fit(79, "1TB") == 5
    assert 1 <= layers_that_fit(28, "1TB") < 5
    assert 1 <= layers_that_fit(79, "60GB") < 5
    with pytest.raises(UserError, match="packs of 8192 tokens do not fit on these GPUs beside a single layer"):
        layers_that_fit(8, "1TB")


def test_sequences_are_as_long_as_the_runs_and_fill_their_packs() -> None:
    part = training.slice_of(resolved_of("glm4.7-flash-8gpu", "--max-tokens-per-gpu", "16384"), 8, 5)
    for mean in (1000, 3000, 8000):
        load = training.load_of(part, H100, Lengths.log_normal(mean, 0.3, 8192))
        assert (load.tokens, load.packs) == (16384, 4)
        assert load.sequences == 16384 // (mean + 256) or math.isclose(load.length, mean + 256, rel_tol=0.3)
        [pack, *_] = load.of_rank(0)
        assert sum(sample.length for sample in pack) > 0.99 * 16384


def test_random_weights_are_all_of_a_checkpoints_tensors(tmp_path: Path) -> None:
    import torch

    write_tiny_checkpoint(tmp_path, seed=1)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    architecture = training.Architecture.from_checkpoint(tmp_path)
    weights = dict(random_weights(architecture, with_mtp=True, dtype=torch.bfloat16, device=torch.device("cpu")))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        name: tuple(header.shape) for name, header in checkpoint.headers.items()
    }
    biases = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert biases == {name for name in weights if name.endswith("e_score_correction_bias")}
    assert all(tensor.abs().max() > 0 for tensor in weights.values())


@pytest.mark.parametrize("flags", [(), ("--num-cpus-per-rank", "3")])
def test_a_slice_has_the_threads_of_a_rank(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the run would have on these GPUs."""
    part = training.slice_of(resolved_of("glm4.7-flash-8gpu", *flags), 2, 1)
    given: list[int] = []

    def take(threads: int) -> None:
        given.append(threads)
        raise UserError("that is all")

    monkeypatch.setattr("torch.set_num_threads", take)
    with pytest.raises(UserError, match="that is all"):
        training.train_slice(0, HashStore(), part.config, part.architecture, Load(8, 1, 1, 100))
    assert given == [3 if flags else threads_each(2, POLLING_PROCESSES)]


def test_gathering_the_weights_is_no_part_of_the_optimizers_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of forward and backward; two replicas gather in 2 and 5 s of a step of 20."""
    clock = [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    def take(seconds: float) -> None:
        clock[0] += seconds

    replicas = [SimpleNamespace(start_param_sync=partial(take, seconds)) for seconds in (2.0, 5.0)]

    def train_step(_: object) -> StepReport:
        take(13.0)
        for replica in replicas:
            replica.start_param_sync()
        return StepReport({}, skipped=False, of_rank={"seconds_forward_backward": 9.0})

    rank = SimpleNamespace(replicas=replicas, train_step=train_step)
    for _ in range(2):
        assert training.seconds_of_step(cast(Any, rank), []) == (9.0, 4.0)


def test_a_machine_that_computes_wrongly_is_not_one_whose_trainer_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skipping = SimpleNamespace(replicas=[], train_step=lambda _: StepReport({}, skipped=True))
    assert training.seconds_of_step(cast(Any, skipping), []) is None
    monkeypatch.setattr(training, "together", lambda *arguments: [(9.0, 4.0), (None, None)])
    resolved, lengths = resolved_of("glm4.7-flash-8gpu"), Lengths.log_normal(3000, 0.6, 8192)
    with pytest.raises(training.ComputesWrongly, match="not finite: this machine computes wrongly"):
        training.measure_training(resolved, replace(H100, gpus=2), lengths)


def fail_or_wait(rank: int, store: Store, folder: Path, how: str) -> None:
    """The first rank waits for good, and tells its process; the second fails meanwhile."""
    if rank == 0:
        (folder / "pid").write_text(str(psutil.Process().pid))
        store.set("waits", "1")
        time.sleep(600)
    store.wait(["waits"])
    if how == "a mistake":
        raise UserError("this is wrong: mend it")
    if how == "torch's":
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
    psutil.Process().kill()


@pytest.mark.usefixtures("forked_together")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("a mistake", "a thing cannot be measured: this is wrong: mend it"),
        ("torch's", "a thing cannot be measured: RuntimeError: CUDA out of memory."),
        ("a kill", "a thing cannot be measured: a process of it ended with status -9"),
    ],
)
def test_a_process_that_fails_is_a_sentence_and_ends_the_others(how: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        together.together("a thing", 2, fail_or_wait, tmp_path, how)
    assert str(raised.value) == told
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def do_not_end(rank: int, store: Store, folder: Path) -> str:
    """Leaves a thread that its process waits for."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    (folder / "pid").write_text(str(psutil.Process().pid))
    return "done"


@pytest.mark.usefixtures("forked_together")
def test_a_process_that_has_its_result_and_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "GRACE_S", 0.5)
    assert together.together("a thing", 1, do_not_end, tmp_path) == ["done"]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
