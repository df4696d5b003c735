"""Weights are replaced all or nothing, between batches, and then the engine is as one freshly started with them."""

import base64
import dataclasses
import os
import pickle
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rollout_support import (
    GREEDY,
    PROMPT,
    EngineUnderTest,
    Kind,
    assert_equals_fresh_load,
    disk_update,
    greedy_result,
    shared_segments,
    tensor_update,
    weights_of,
)
from safetensors.torch import save_file
from torch import Tensor

from recipe.sampling.sglang_response import read_sample
from recipe.system.errors import UserError
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.sync import WeightSync


def _same(one: tuple[list[int], Tensor], other: tuple[list[int], Tensor]) -> bool:
    """Whether two results of one engine are the same; SGLang repeats them too, when nothing else runs."""
    return one[0] == other[0] and torch.equal(one[1], other[1])


def test_a_tensor_update_equals_a_fresh_load(engine: EngineUnderTest, other_checkpoint: Path) -> None:
    assert engine.update(weights_of(other_checkpoint))[0] == 200
    assert engine.request("GET", "/model_info")[1]["weight_version"] == "2"
    answer = engine.generate_one(PROMPT, GREEDY)
    assert answer["meta_info"]["weight_version"] == "2"
    assert set(read_sample(answer).versions) == {"2"}
    assert_equals_fresh_load(engine, other_checkpoint)


def test_a_disk_update_equals_a_fresh_load(engine: EngineUnderTest, other_checkpoint: Path) -> None:
    engine.load(other_checkpoint, "2")
    by_disk = greedy_result(engine)
    assert_equals_fresh_load(engine, other_checkpoint)
    engine.load(engine.checkpoint, "3")
    engine.update(weights_of(other_checkpoint))
    assert _same(greedy_result(engine), by_disk)


@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
def test_the_trainers_way_equals_a_fresh_load_and_is_checked(
    engine: EngineUnderTest, other_checkpoint: Path, transfer: Literal["tensor", "distributed"]
) -> None:
    """In many small buckets, some of which part what SGLang fuses; then one weight changes on the way."""
    model = engine.reference.config
    sync = WeightSync(
        transfer=transfer,
        bucket_bytes=100_000,
        ranks_per_engine=1,
        address="127.0.0.1",
        checksums=lambda: ExpectedChecksums(model.num_hidden_layers, model.n_routed_experts),
    )
    weights = weights_of(other_checkpoint)
    sync.send(weights.items(), {0: engine.url}, "2").check_taken()
    assert engine.request("GET", "/model_info")[1]["weight_version"] == "2"
    assert_equals_fresh_load(engine, other_checkpoint)

    router = "model.layers.2.mlp.gate.weight"
    stale = {name: tensor for name, tensor in weights.items() if name != router}
    checksums = ExpectedChecksums(model.num_hidden_layers, model.n_routed_experts)
    checksums.add(router, weights[router] + 1)
    differing = dataclasses.replace(sync, checksums=lambda: checksums)
    with pytest.raises(UserError, match=rf"version 3, 1 of \d+ tensors .* first of them {router}: samples"):
        differing.send(stale.items(), {0: engine.url}, "3").check_taken()


def test_a_broadcast_without_a_group_is_refused(engine: EngineUnderTest) -> None:
    assert engine.request("POST", "/destroy_weights_update_group", {"group_name": "nobody's"})[0] == 400


@pytest.mark.parametrize(
    "part",
    [
        "mlp.gate.weight",
        "e_score_correction_bias",
        "experts.3.gate_proj",
        "experts.5.down_proj",
        "shared_experts",
        "kv_b_proj",
        "_a_proj",
        "norm.weight",
        "lm_head",
        "embed_tokens",
    ],
)
def test_each_kind_of_weight_reaches_the_forward_pass(engine: EngineUnderTest, tmp_path: Path, part: str) -> None:
    """The router of some versions of SGLang keeps a copy of its weight; nothing here may. (Of the two `_a_proj`, SGLang
    takes none without the other.)"""
    weights = weights_of(engine.checkpoint)
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: tensor + torch.randn(tensor.shape, generator=generator) * 0.3
        for name, tensor in weights.items()
        if part in name
    }
    before = greedy_result(engine)
    assert engine.update(changed)[0] == 200
    assert not _same(greedy_result(engine), before)
    save_file(weights | changed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((engine.checkpoint / "config.json").read_bytes())
    assert_equals_fresh_load(engine, tmp_path)


def test_bfloat16_weights_are_taken_exactly(engine: EngineUnderTest) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in weights_of(engine.checkpoint).items()}
    engine.update(rounded)
    by_bfloat16 = greedy_result(engine)
    engine.update({name: tensor.float() for name, tensor in rounded.items()})
    assert _same(greedy_result(engine), by_bfloat16)


def test_an_update_leaves_no_shared_memory(engine: EngineUnderTest, other_checkpoint: Path) -> None:
    before = shared_segments(os.getpid())
    engine.update(weights_of(other_checkpoint))
    if engine.kind is Kind.EMBEDDED:
        engine.update({"model.norm.weight": torch.zeros(1)})
    assert shared_segments(os.getpid()) == before


@pytest.mark.parametrize(
    ("name", "tensor", "word"),
    [
        (
            "model.layers.1.mlp.experts.99.up_proj.weight",
            torch.zeros(64, 128),
            "no weight",
        ),
        ("model.norm.weight", torch.zeros(127), "[127]"),
        ("model.norm.weight", torch.zeros(128, dtype=torch.int64), "int64"),
        ("model.norm.weight", torch.zeros(128, dtype=torch.float64), "float64"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    embedded: EngineUnderTest, other_checkpoint: Path, name: str, tensor: Tensor, word: str
) -> None:
    before = greedy_result(embedded)
    good = {k: v for k, v in weights_of(other_checkpoint).items() if k != name}
    status, answer = embedded.update(good | {name: tensor})
    assert status == 400
    assert word in answer["error"]["message"]
    assert _same(greedy_result(embedded), before)
    assert embedded.request("GET", "/model_info")[1]["weight_version"] == "1"


def test_a_checkpoint_that_lacks_weights_changes_nothing(embedded: EngineUnderTest, tmp_path: Path) -> None:
    before = greedy_result(embedded)
    weights = weights_of(embedded.checkpoint)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    for folder, word in ((tmp_path, "lm_head.weight"), (tmp_path / "nowhere", "no *.safetensors")):
        assert word in embedded.refuse("/update_weights_from_disk", disk_update(folder, "2"))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert "cannot read" in embedded.refuse("/update_weights_from_disk", disk_update(tmp_path, "2"))
    assert _same(greedy_result(embedded), before)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/owned",)


@pytest.mark.parametrize(
    "content", [_Evil(), {"flattened_tensor": "text", "metadata": []}, [("lm_head.weight", "text")], {"a": 1}, 5]
)
def test_a_payload_of_anything_but_tensors_is_refused(embedded: EngineUnderTest, content: object) -> None:
    payload = base64.b64encode(pickle.dumps(content)).decode()
    for text in (payload, "?", base64.b64encode(b"junk").decode()):
        embedded.refuse("/update_weights_from_tensor", tensor_update(text, "2"))
    assert not Path("/tmp/owned").exists()


def test_an_update_waits_for_running_requests_and_new_ones_wait_for_it(
    engine: EngineUnderTest, other_checkpoint: Path
) -> None:
    answers: list[Any] = []
    long = dataclasses.replace(GREEDY, max_new_tokens=50)
    threads = [threading.Thread(target=lambda: answers.extend(engine.generate([PROMPT] * 4, long))) for _ in range(8)]
    for thread in threads:
        thread.start()
    engine.update(weights_of(other_checkpoint))
    for thread in threads:
        thread.join()
    versions = [answer["meta_info"]["weight_versions"] for answer in answers]
    assert len(versions) == 32
    assert all(len(spans) == 1 for spans in versions)


def test_update_sessions_open_and_close_as_sglangs(engine: EngineUnderTest) -> None:
    engine.post("/begin_weight_update")
    assert engine.request("POST", "/begin_weight_update", {})[0] == 400
    engine.post("/end_weight_update")
    assert engine.request("POST", "/end_weight_update", {})[0] == 400
