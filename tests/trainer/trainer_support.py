"""Configurations, samples and worker processes for the trainer's tests."""

import gc
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipe.batching.schedule import schedule
from recipe.config import Architecture, Config
from recipe.messages import TrainSample
from recipe.weights.tiny import write_tiny_checkpoint

PROMPT_LENGTH, VOCABULARY = 5, 96


def tiny_config(checkpoint: Path, /, **groups: dict[str, Any]) -> Config:
    """A policy-gradient run on the checkpoint, fp32 on the CPU; `groups` override."""
    values: dict[str, dict[str, Any]] = {
        "model": {"hf_checkpoint": checkpoint, "bf16": False},
        "cluster": {"actor_num_gpus_per_node": 1, "device": "cpu"},
        "data": {"prompt_data": checkpoint},
        "rollout": {
            "engine": "embedded",
            "num_rollout": 4,
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 16,
            "rm_type": "math",
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "perf": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64},
        "mtp": {"mtp_num_layers": 1},
    }
    return Config.model_validate({name: values.get(name, {}) | groups.get(name, {}) for name in values | groups})


def random_samples(count: int, seed: int, *, trained: bool = True) -> list[TrainSample]:
    """Pairs of different responses to the same prompt, with everything that a policy loss may read."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(0, VOCABULARY, (-(-count // 2), PROMPT_LENGTH))
    samples = []
    for index in range(count):
        response = int(draw.integers(3, 12))
        floats = [draw.normal(size=response).astype(np.float32) for _ in range(2)]
        mask = np.ones(response, dtype=np.bool_)
        mask[draw.integers(0, response)] = not trained or response % 2 == 0
        samples.append(
            TrainSample(
                index=index,
                tokens=np.concatenate([prompts[index // 2], draw.integers(0, VOCABULARY, response)]),
                loss_mask=mask,
                weight=1 / (count * mask.sum()),
                mtp_weight=1 / (8 * count),
                advantages=floats[0],
                rollout_log_probs=-np.abs(floats[1]),
                sources=np.arange(response) % 2,
            )
        )
    return samples


@cache
def random_checkpoint() -> Path:
    """The tiny architecture with weights large enough that routing and attention matter, biases not zero."""
    from safetensors.torch import load_file, save_file

    directory = Path(tempfile.mkdtemp(prefix="tiny-checkpoint-")) / "hf"
    write_tiny_checkpoint(directory, seed=7)
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        spread = 0.3 if "e_score" in name else 0.15 if tensor.dim() > 1 else 0.1
        noise = torch.randn(tensor.shape, generator=generator) * spread
        tensors[name] = noise + (1.0 if tensor.dim() == 1 and "e_score" not in name else 0.0)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def scheduled(trainer: Any, samples: list[TrainSample]) -> list[list[TrainSample]]:
    """The microbatches of this rank, as the run would pack them."""
    config = trainer.config
    plan = schedule(
        [sample.length for sample in samples],
        data_parallel_size=config.data_parallel_size,
        max_tokens=config.perf.max_tokens_per_gpu,
        count_multiple=config.perf.microbatch_multiple,
    )
    return trainer.own_shard([[[samples[i] for i in pack] for pack in rank] for rank in plan])


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the policy, by Hugging Face name. Collective."""
    return {name: weight.clone() for name, weight in trainer.weights()}


def _rank_main(rank: int, function: Callable, config: Config, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

    # megatron collects garbage at every save and load: half a second each for what was imported alone.
    gc.freeze()
    architecture = Architecture.from_checkpoint(config.model.hf_checkpoint)
    store = dist.FileStore(str(folder / "store"), config.world_size)
    trainer = TrainerRank(config, architecture, Rendezvous(rank, 0, config.world_size, store))
    result = function(trainer, *arguments)
    torch.save(result, folder / f"{rank}.pt")
    trainer.close()


def on_ranks(function: Callable, config: Config, *arguments: Any) -> list[Any]:
    """The results of `function(trainer, *arguments)` on every rank of `config`'s layout, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank_main,
            (function, config, Path(folder), arguments),
            nprocs=config.world_size,
            start_method="forkserver",
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(config.world_size)]
