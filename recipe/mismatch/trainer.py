"""A step's samples once more through the trainer, alone in a process of its own."""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from recipe.batching.schedule import schedule
from recipe.config import Architecture, Config
from recipe.messages import Scores, TrainSample

NOWHERE = Path("/nonexistent")
"""Nothing is saved, and no run's own checkpoints are gone on from."""
ALONE = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "num_layers_per_virtual_pipeline_stage": None,
}


def alone(config: Config, weights: Path | None, *, bf16: bool) -> Config:
    """The trainer of a run as one process, with these weights, or those that the run began with."""

    def changed(group: str, **values: Any) -> Any:
        return getattr(config, group).model_copy(update=values)

    return config.model_copy(
        update={
            "cluster": changed("cluster", actor_num_nodes=1, actor_num_gpus_per_node=1),
            "model": changed("model", bf16=bf16),
            "perf": changed("perf", **ALONE, use_dynamic_batch_size=True, **_pack(config)),
            "checkpoint": changed("checkpoint", load=weights, save=NOWHERE, no_load_optim=True, async_save=False),
            "grpo": changed("grpo", use_kl_loss=False, kl_coef=0.0, use_rollout_routing_replay=False,
                            use_routing_replay=True),
        }
    )  # fmt: skip


def _pack(config: Config) -> dict[str, int]:
    perf = config.perf
    longest = config.rollout.rollout_max_context_len or config.rollout.rollout_max_response_len
    return {"max_tokens_per_gpu": perf.max_tokens_per_gpu or longest}


def scores(config: Config, architecture: Architecture, samples: list[TrainSample], export: Path | None) -> Scores:
    """Log-probs of the samples' responses, and the experts that the trainer took them to: where the samples say, or by
    itself. `export`: where its weights are written in Hugging Face's form. Raises UserError for weights that cannot be
    read."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_scores, config, architecture, samples, export).result()


def _scores(config: Config, architecture: Architecture, samples: list[TrainSample], export: Path | None) -> Scores:
    from torch.distributed import FileStore

    from recipe.megatron.layout import Rendezvous
    from recipe.megatron.rank import TrainerRank

    with tempfile.TemporaryDirectory() as folder:
        rank = TrainerRank(config, architecture, Rendezvous(0, 0, 1, FileStore(f"{folder}/store", 1)))
        rank.load()
        if export is not None:
            rank.export_hugging_face(export)
        [packs] = schedule(
            [sample.length for sample in samples], data_parallel_size=1, max_tokens=config.perf.max_tokens_per_gpu
        )
        found = rank.log_probs([[samples[number] for number in pack] for pack in packs])
        rank.close()
    return found
