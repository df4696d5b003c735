"""What is wrong with a checkpoint is said in a sentence, before any of its weights is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion_support import MTP, WEIGHTS, copy_of, rewrite, run_conversion, set_config, split_into_shards
from safetensors.torch import load_file, save_file
from trainer_support import random_checkpoint

from recipe.config import Architecture
from recipe.system.errors import UserError
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.inspection import inspect

NORM = "model.layers.0.input_layernorm.weight"
Spoil = Callable[[Path], None]


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Spoils the tensors."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        edit(tensors)
        rewrite(directory, tensors)

    return spoil


def without_a_shard(directory: Path) -> None:
    split_into_shards(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()


def with_a_truncated_shard(directory: Path) -> None:
    split_into_shards(directory)
    file = directory / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def with_a_tensor_twice(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    split_into_shards(directory)
    for file in sorted(directory.glob("*.safetensors")):
        names = load_file(file).keys() | {NORM}
        save_file({name: tensors[name] for name in names}, file)


def with_an_index_that_lies(directory: Path) -> None:
    split_into_shards(directory)
    index = directory / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"][NORM]
    index.write_text(json.dumps(document))


def without_mtp(directory: Path) -> None:
    change(lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.4.")])(directory)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_a_shard, "model-00002-of-00003.safetensors is named by the checkpoint's index but missing"),
        (with_a_truncated_shard, "model-00002-of-00003.safetensors is truncated or no safetensors file"),
        (with_a_tensor_twice, f"tensor {NORM} is in model-00001-of-00003.safetensors and again in"),
        (with_an_index_that_lies, f"tensor {NORM} is in model-0000"),
        (change(lambda t: t.pop(NORM)), f"lacks tensor {NORM}: the checkpoint is incomplete"),
        (
            change(lambda t: t.update({NORM: t[NORM][1:].clone()})),
            f"{NORM} has shape [127], but config.json asks for [128]",
        ),
        (
            change(lambda t: t.update({NORM: t[NORM].half()})),
            f"{NORM} has type F16, but config.json's dtype float32 means F32",
        ),
        (change(lambda t: t.update(stranger=torch.ones(1))), "has tensor stranger: no part of this architecture"),
        (without_mtp, "lacks tensor model.layers.4.eh_proj.weight and 41 more"),
    ],
    ids=["missing shard", "truncated", "twice", "index", "missing", "shape", "type", "unexpected", "no MTP"],
)
def test_a_spoiled_checkpoint_is_told_in_a_sentence(spoil: Spoil, sentence: str, tmp_path: Path) -> None:
    directory = copy_of(random_checkpoint(), tmp_path / "hf")
    architecture = Architecture.from_checkpoint(directory)
    assert inspect(HuggingFaceCheckpoint(directory), architecture, with_mtp=True) == []
    spoil(directory)
    with pytest.raises(UserError) as told:
        inspect(HuggingFaceCheckpoint(directory), architecture, with_mtp=True)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_a_checkpoint_without_its_mtp_layer_converts_without_the_flag(tmp_path: Path) -> None:
    directory = copy_of(random_checkpoint(), tmp_path / "hf")
    without_mtp(directory)
    assert inspect(HuggingFaceCheckpoint(directory), Architecture.from_checkpoint(directory), with_mtp=False) == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but this recipe trains glm4_moe_lite only"),
        ({"num_nextn_predict_layers": 0}, "--mtp-num-layers 1 contradicts"),
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, object], sentence: str, tmp_path: Path) -> None:
    directory = copy_of(random_checkpoint(), tmp_path / "hf")
    set_config(directory, **config)
    status, output = run_conversion("convert", "--hf-checkpoint", directory, "--save", tmp_path / "out", *MTP)
    assert status == 2
    assert sentence in output
    assert "Traceback" not in output
