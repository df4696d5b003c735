"""What the plan says each rank holds, against the trainer's own ranks of the tiny model, with all their memory. (Those
of the real one are compared where they are built without weights: tests/weights/test_full_size.py.)"""

from pathlib import Path

import numpy as np
import pytest
import torch
from full_size_support import resolve_full_size
from trainer_support import on_ranks, random_checkpoint, tiny_config

from recipe.config import Architecture, Config, Resolved
from recipe.messages import TrainSample
from recipe.plan.activations import ActivationModel, Pack
from recipe.plan.hardware import DEFAULT_GPU, Machine
from recipe.plan.memory import MemoryModel, Use
from recipe.plan.shards import Part, stage_shards


def test_the_parts_of_the_model_are_as_published(tmp_path: Path) -> None:
    resolved = resolve_full_size(tmp_path, ("--recipe", "glm4.7-flash-8gpu-mtp"))
    one = resolved.config.model_copy(
        update={"perf": resolved.config.perf.model_copy(update={"expert_model_parallel_size": 1})}
    )
    [shard] = stage_shards(one, resolved.architecture)
    assert round((shard.parameters - shard.elements[Part.MTP]) / 1e9, 2) == 29.94
    assert round(shard.elements[Part.MTP] / 1e9, 3) == 0.644
    assert round(shard.elements[Part.ATTENTION] / 47 / 1e6, 2) == 21.76
    assert shard.elements[Part.EXPERTS] == 46 * 64 * 3 * 2048 * 1536


def memory_model(config: Config, pack: Pack | None = None) -> MemoryModel:
    resolved = Resolved(config, Architecture.from_checkpoint(config.model.hf_checkpoint), {}, ())
    machine = Machine.described(DEFAULT_GPU, config.world_size, "1TB", None, 0.0)
    if pack is None:
        return MemoryModel.of(resolved, machine, on_gpu=False)
    return MemoryModel(resolved, machine, on_gpu=False, pack=pack)


def held(trainer) -> tuple[int, dict[Use, int]]:
    """The stage of a rank, and what its tensors really take."""
    from megatron.core import parallel_state

    chunks = trainer.chunks
    buffers = [b for replica in trainer.replicas for b in replica.buffers + replica.expert_parallel_buffers]
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage() for c in chunks for t in c.parameters()}
    biases = [b for c in chunks for name, b in c.named_buffers() if name.endswith("expert_bias")]
    return parallel_state.get_pipeline_model_parallel_rank(), {
        Use.WEIGHTS: sum(storage.nbytes() for storage in weights.values()) + sum(bias.nbytes for bias in biases),
        Use.GRADIENTS: sum(buffer.grad_data.nbytes for buffer in buffers),
        Use.OPTIMIZER: sum(state.nbytes for state in trainer.optimization.state_tensors),
    }


TRAINED = {"mtp_num_layers": 1, "enable_mtp_training": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
HELD = {
    "one process": (1, {}, {}),
    "bf16, MTP trained": (1, {}, {"mtp": TRAINED, "model": {"bf16": True}}),
    "CPU Adam": (1, {}, {"optimizer": {"lr": 1e-3, "optimizer_cpu_offload": True}}),
    "DP2": (2, {}, {}),
    "TP2 EP2": (2, TP2 | {"expert_model_parallel_size": 2}, {}),
    "PP2, uneven": (2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}, {}),
    "PP2, interleaved": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", HELD)
def test_weights_gradients_and_optimizer_are_planned_to_the_byte(layout: str) -> None:
    ranks, perf, groups = HELD[layout]
    perf = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64} | perf
    checkpoint = random_checkpoint()
    groups = {
        name: ({"hf_checkpoint": checkpoint} if name == "model" else {}) | group for name, group in groups.items()
    }
    config = tiny_config(checkpoint, cluster={"actor_num_gpus_per_node": ranks, "device": "cpu"}, perf=perf, **groups)
    model = memory_model(config)
    found = on_ranks(held, config)
    total = planned_total = 0
    for stage, uses in found:
        planned = model.held(model.shards[stage])
        assert uses[Use.WEIGHTS] == planned[Use.WEIGHTS]
        assert uses[Use.GRADIENTS] == planned[Use.GRADIENTS]
        total += uses[Use.OPTIMIZER]
        planned_total += planned[Use.OPTIMIZER]
    # Where ranks share the state, some of them have the padding of the buffers too.
    assert total == planned_total if ranks == 1 else total <= planned_total <= 1.01 * total


def kept_by_autograd(trainer, samples) -> int:
    """Bytes that a forward pass leaves behind for its backward pass, by asking autograd."""
    from recipe.megatron.microbatch import build_microbatch
    from recipe.megatron.step import token_layout

    batch = build_microbatch(samples, token_layout(trainer.config.mtp.enable_mtp_training))
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.chunks[0].parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.replicas[0](batch.inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
KEPT = {
    "nothing recomputed": ({}, {}),
    "all recomputed": (FULL, {}),
    "recomputed in twos": (FULL | {"recompute_num_layers": 2}, {}),
    "two layers recomputed": (FULL | {"recompute_method": "block", "recompute_num_layers": 2}, {}),
    "attention by matrix products": ({"attention_backend": "unfused"}, {}),
    "MTP trained": ({}, {"mtp": TRAINED}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT)
def test_activations_are_planned_within_a_tenth(case: str) -> None:
    perf, groups = KEPT[case]
    perf = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 512} | perf
    config = tiny_config(random_checkpoint(), perf=perf, **groups)
    draw = np.random.default_rng(0)
    samples = [
        TrainSample(
            index=number,
            tokens=draw.integers(0, 96, 60),
            loss_mask=np.ones(48, dtype=np.bool_),
            weight=1 / 48,
            mtp_weight=1 / 47,
            advantages=np.ones(48, dtype=np.float32),
            rollout_log_probs=-np.ones(48, dtype=np.float32),
        )
        for number in range(8)
    ]
    model = memory_model(config, Pack(tokens=480, asked=384, longest=60, keys=480))
    [shard] = model.shards
    counts = ActivationModel(model.resolved.architecture, config, model.pack, on_gpu=False)
    planned = counts.of_stage(shard, 1).kept + counts.log_probs() + counts.mtp()
    [measured] = on_ranks(kept_by_autograd, config, samples)
    assert planned == pytest.approx(measured, rel=0.1)
