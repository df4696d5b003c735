"""Hugging Face to torch_dist and back: every bit, under every layout, and nothing that only looks finished."""

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from conversion_support import (
    MTP,
    WEIGHTS,
    assert_same_bits,
    bf16_checkpoint,
    convert,
    copy_of,
    export,
    rewrite,
    run_by_torchrun,
    run_conversion,
    set_config,
    split_into_shards,
    tensors_of,
)
from forked_commands import Forked, forked, run_module
from safetensors.torch import load_file
from torch import Tensor
from trainer_support import on_ranks, random_checkpoint, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import Architecture
from recipe.conversion.progress import ByteProgress
from recipe.conversion.verify import verify
from recipe.messages import Progress
from recipe.system.errors import USER_ERROR_STATUS, UserError
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.table import placements
from recipe.weights.torch_dist import TorchDistCheckpoint

TINY_TENSORS = "verified 129 tensors and 42 of the MTP layer bit for bit"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "torch_dist"
    assert TINY_TENSORS in convert(random_checkpoint(), target, *MTP)
    return target


def load_then_save(trainer, target: Path) -> dict[str, Tensor] | None:
    """The Hugging Face tensors that a rank gathers after loading; saves a training checkpoint of its layout."""
    trainer.load()
    gathered = dict(trainer.weights())
    trainer.save(target, Progress(rollouts=1))
    return gathered


@pytest.mark.slow
def test_weights_pass_from_layout_to_layout_and_back_without_a_bit_changed(converted: Path, tmp_path: Path) -> None:
    original = load_file(random_checkpoint() / WEIGHTS)
    layouts = {
        "EP2": {"expert_model_parallel_size": 2},
        "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "PP2 uneven": {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1},
        "PP2+EP2": {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
    }
    load = converted
    for number, (name, perf) in enumerate(layouts.items()):
        config = tiny_config(
            random_checkpoint(),
            cluster={"actor_num_gpus_per_node": 4 if name == "PP2+EP2" else 2},
            perf=perf,
            checkpoint={"load": load},
        )
        load = tmp_path / str(number)
        for gathered in on_ranks(load_then_save, config, load):
            assert_same_bits(gathered, original)
    export(load, random_checkpoint(), tmp_path / "exported", processes=2)
    assert_same_bits(tensors_of(tmp_path / "exported"), original)


def test_bf16_weights_and_fp32_router_biases_keep_their_bits(tmp_path: Path) -> None:
    source = bf16_checkpoint(tmp_path / "hf")
    split_into_shards(source)
    assert TINY_TENSORS in convert(source, tmp_path / "torch_dist", *MTP, processes=2)
    export(tmp_path / "torch_dist", source, tmp_path / "exported")
    original = tensors_of(source)
    assert {tensor.dtype for name, tensor in original.items() if "e_score" in name} == {torch.float32}
    assert_same_bits(tensors_of(tmp_path / "exported"), original)


def test_the_manifest_has_the_hash_of_every_tensor(converted: Path) -> None:
    manifest = json.loads((converted / "tensors.json").read_text())
    original = load_file(random_checkpoint() / WEIGHTS)
    assert manifest.keys() == original.keys()
    for name, tensor in original.items():
        assert manifest[name] == {
            "dtype": "float32",
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        }


def test_an_export_is_a_checkpoint_to_transformers(converted: Path, tmp_path: Path) -> None:
    export(converted, random_checkpoint(), tmp_path / "exported")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (random_checkpoint(), tmp_path / "exported")
        ]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template


def export_small_shards(words: list[str]) -> None:
    from recipe.conversion import export

    export.SHARD_BYTES = 2_000_000
    sys.argv = ["export", *words]
    export.main()


def test_shards_of_an_export_are_indexed(converted: Path, tmp_path: Path) -> None:
    words = ["--load", converted, "--hf-checkpoint", random_checkpoint(), "--save", tmp_path / "exported", "--verify"]
    status, output = forked(export_small_shards, list(map(str, words)))
    assert status == 0, output
    shards = sorted(tmp_path.glob("exported/*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))
    ]
    assert len(shards) == 3
    assert_same_bits(tensors_of(tmp_path / "exported"), load_file(random_checkpoint() / WEIGHTS))
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors_of(tmp_path / "exported").values()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")


def test_an_mtp_layer_that_was_not_trained_is_exported_from_the_origin(tmp_path: Path) -> None:
    output = convert(random_checkpoint(), tmp_path / "torch_dist")
    assert "the MTP layer (42 tensors) is left out; --mtp-num-layers 1 carries it along" in output
    output = export(tmp_path / "torch_dist", random_checkpoint(), tmp_path / "exported")
    assert "has no MTP layer" in output
    assert_same_bits(tensors_of(tmp_path / "exported"), load_file(random_checkpoint() / WEIGHTS))


def with_duplicates(target: Path) -> dict[str, Tensor]:
    copy_of(random_checkpoint(), target)
    tensors = load_file(target / WEIGHTS)
    layer = f"model.layers.{Architecture.from_checkpoint(target).num_hidden_layers}"
    tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    rewrite(target, tensors)
    return tensors


def test_copies_that_the_mtp_layer_carries_are_exported_again(tmp_path: Path) -> None:
    tensors = with_duplicates(tmp_path / "hf")
    assert TINY_TENSORS in convert(tmp_path / "hf", tmp_path / "torch_dist", *MTP)
    export(tmp_path / "torch_dist", tmp_path / "hf", tmp_path / "exported")
    assert_same_bits(tensors_of(tmp_path / "exported"), tensors)


def test_a_copy_that_differs_from_its_original_is_refused(tmp_path: Path) -> None:
    tensors = with_duplicates(tmp_path / "hf")
    [name] = [name for name in tensors if name.endswith("shared_head.head.weight")]
    tensors[name][0, 0] += 1
    rewrite(tmp_path / "hf", tensors)
    status, output = run_conversion("convert", "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "t", *MTP)
    assert status == 2
    assert f"tensor {name} differs from lm_head.weight" in output


def flipped(source: Path, target: Path, file: str) -> Path:
    """A copy with one bit of the middle of `file` changed."""
    copy_of(source, target)
    content = bytearray((target / file).read_bytes())
    content[len(content) // 2] ^= 1
    (target / file).write_bytes(content)
    return target


def test_verification_finds_a_flipped_bit(converted: Path, tmp_path: Path) -> None:
    architecture = Architecture.from_checkpoint(random_checkpoint())
    table = list(placements(architecture, with_mtp=True).values())
    source = HuggingFaceCheckpoint(random_checkpoint())

    def run(directory: Path) -> int:
        return len(verify(TorchDistCheckpoint(directory), source, table, ByteProgress("", 1, shown=False)))

    assert run(converted) == 171
    with pytest.raises(UserError, match="differs between"):
        run(flipped(converted, tmp_path / "flipped", "__0_0.distcp"))


def test_a_torch_dist_file_that_is_cut_off_is_named(converted: Path, tmp_path: Path) -> None:
    copy_of(converted, tmp_path / "cut")
    file = tmp_path / "cut" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    words = ("--load", tmp_path / "cut", "--hf-checkpoint", random_checkpoint(), "--save", tmp_path / "out")
    status, output = run_conversion("export", *words)
    assert status == 2
    assert f"{file} is missing, cut off or damaged" in output
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_which_a_part_is_not_stored_is_refused(converted: Path) -> None:
    architecture = Architecture.from_checkpoint(random_checkpoint())
    larger = architecture.model_copy(update={"vocab_size": 2 * architecture.vocab_size})
    embedding = "embedding.word_embeddings.weight"
    checkpoint = TorchDistCheckpoint(converted)
    assert dict(checkpoint.tensors(placements(architecture, with_mtp=True)[embedding]))
    with pytest.raises(UserError, match="lacks a part of a parameter"):
        dict(checkpoint.tensors(placements(larger, with_mtp=True)[embedding]))


@pytest.mark.parametrize(("module", "by_torchrun"), [("convert", True), ("export", False)])
def test_a_destination_that_exists_is_left_alone(
    module: str, by_torchrun: bool, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    load = () if module == "convert" else ("--load", converted)
    words = (*load, "--hf-checkpoint", random_checkpoint(), "--save", tmp_path / "there")
    run = run_by_torchrun if by_torchrun else run_conversion
    status, output = run(module, *words, processes=2)
    assert status == USER_ERROR_STATUS
    assert output.count("there exists already: remove it, or give another --save") == 1
    said = [line for line in output.splitlines() if not line.startswith("note:")]
    assert len(said) == 1, "torchrun has nothing to add"
    assert not list((tmp_path / "there").iterdir())


def run_on_small_disk(module: str, words: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    run_module(module, words)


@pytest.mark.parametrize("module", ["convert", "export"])
def test_a_disk_that_fills_is_told_and_leaves_nothing_that_looks_finished(
    module: str, converted: Path, tmp_path: Path
) -> None:
    load = [] if module == "convert" else ["--load", str(converted)]
    words = [*load, "--hf-checkpoint", str(random_checkpoint()), "--save", str(tmp_path / "full" / "out")]
    status, output = forked(run_on_small_disk, f"recipe.conversion.{module}", words)
    assert status == 2, output
    assert "cannot be written" in output
    assert "Traceback" not in output
    assert not (tmp_path / "full" / "out").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    from recipe.conversion.destination import check_destination

    with pytest.raises(UserError, match=r"GB free, but out takes .* GB"):
        check_destination(tmp_path / "out", 1 << 60)


def convert_and_hang(words: list[str]) -> None:
    """What is written is not put in its place."""
    Path.rename = lambda *_: time.sleep(600)
    run_module("recipe.conversion.convert", words)


def test_a_killed_conversion_does_not_look_finished_and_is_begun_anew(tmp_path: Path) -> None:
    target = tmp_path / "torch_dist"
    words = ["--hf-checkpoint", str(random_checkpoint()), "--save", str(target), *MTP]
    partial = tmp_path / ".torch_dist.partial"
    deadline = time.monotonic() + 600
    with Forked(convert_and_hang, words):  # which kills it at its end
        while not partial.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert partial.exists()
    assert not target.exists()
    assert TINY_TENSORS in convert(random_checkpoint(), target, *MTP)
    assert not partial.exists()


def start_from(trainer) -> dict[str, Tensor]:
    assert trainer.load() == Progress()
    return dict(trainer.weights())


def test_training_starts_from_weights_in_load_of_either_kind(converted: Path, tmp_path: Path) -> None:
    other = copy_of(random_checkpoint(), tmp_path / "other")
    tensors = {name: tensor + 1 for name, tensor in load_file(other / WEIGHTS).items()}
    rewrite(other, tensors)
    original = load_file(random_checkpoint() / WEIGHTS)
    for load, expected in ((other, tensors), (converted, original), (tmp_path / "empty", original)):
        config = tiny_config(random_checkpoint(), checkpoint={"load": load, "save": tmp_path / "empty"})
        [gathered] = on_ranks(start_from, config)
        assert_same_bits(gathered, expected)


def test_an_export_says_the_type_it_is_written_in(tmp_path: Path) -> None:
    source = bf16_checkpoint(tmp_path / "hf")
    convert(source, tmp_path / "torch_dist", *MTP)
    set_config(source, dtype="float32")
    export(tmp_path / "torch_dist", source, tmp_path / "exported")
    assert Architecture.from_checkpoint(tmp_path / "exported").dtype == "bfloat16"
