"""Both engines stand still between two tokens, take weights, and go on with the cache kept or recomputed."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rollout_support import (
    GREEDY,
    PROMPT,
    EngineUnderTest,
    Kind,
    generation,
    load_reference,
    log_probs_of,
    routed_by,
    weights_of,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import Glm4MoeLiteForCausalLM

from recipe.config import Architecture
from recipe.config.groups_rollout import InFlight
from recipe.messages import RoutedExperts
from recipe.sampling.routing import RouterShape, read_routed_experts
from recipe.sampling.sglang_response import SampleAnswer, read_sample
from recipe.weight_sync.result import UpdateResult
from recipe.weight_sync.sync import WeightSync

Transfer = Literal["tensor", "distributed", "disk"]

LONG = replace(GREEDY, max_new_tokens=48)
REQUEST = generation([PROMPT, PROMPT, [5, 6, 12, 3]], LONG) | {"return_routed_experts": True, "extra_key": "1"}
ATTEMPTS = 20


@dataclass
class Row:
    """A response that was under way when weights of version 2 came."""

    ids: list[int]
    """Prompt and response."""
    start: int
    """Where the response begins in them,"""
    border: int
    """and the tokens of version 2."""
    sample: SampleAnswer
    routed: RoutedExperts
    """[length - 1, M, K], each token's experts in ascending order."""

    @property
    def log_probs(self) -> Tensor:
        """Of the response's tokens."""
        return torch.tensor(self.sample.log_probs)


def update_in_flight(engine: EngineUnderTest, checkpoint: Path, in_flight: InFlight, transfer: Transfer) -> list[Row]:
    """With every attempt the engine has made a little more when it is to stand still, until it is in the midst of the
    responses. A request that comes while it stands still waits."""
    shape, weights = RouterShape.of(Architecture.from_checkpoint(engine.checkpoint)), weights_of(checkpoint)
    sync = WeightSync(transfer, 1 << 20, 1, "127.0.0.1", in_flight=in_flight)
    for attempt in range(ATTEMPTS):
        engine.load(engine.checkpoint, "1")
        with ThreadPoolExecutor(2) as pool:
            under_way = pool.submit(engine.post, "/generate", REQUEST)
            time.sleep(0.02 * 1.4**attempt)
            if transfer == "disk":
                result = sync.load_from_disk(checkpoint, {0: engine.url}, "2")
            else:
                result = sync.send(weights.items(), {0: engine.url}, "2")
            assert result == UpdateResult()
            assert result.paused_s is not None
            late = pool.submit(engine.generate_one, PROMPT, replace(GREEDY, max_new_tokens=2))
            time.sleep(0.05)
            assert not late.done()
            engine.post("/continue_generation")
            assert set(read_sample(late.result(240)).versions) == {"2"}
            rows = list(read(under_way.result(240), shape))
        if all(row.start < row.border < len(row.ids) for row in rows):
            return rows
    pytest.fail(f"in {ATTEMPTS} attempts the weights never came in the midst of the responses")


def read(answers: list[Any], shape: RouterShape) -> Iterator[Row]:
    for prompt, answer in zip(REQUEST["input_ids"], answers, strict=True):
        sample = read_sample(answer)
        older = sample.versions.count("1")
        assert sample.versions == ["1"] * older + ["2"] * (len(sample.ids) - older)
        routed = np.sort(read_routed_experts(answer["meta_info"]["routed_experts"], shape), -1)
        yield Row(prompt + sample.ids, len(prompt), len(prompt) + older, sample, routed)


def with_cache_of(old: Glm4MoeLiteForCausalLM, new: Glm4MoeLiteForCausalLM, row: Row) -> Tensor:
    """Log-probs of the tokens of version 2, where `old` has read all before the last token of version 1, and `new` goes
    on."""
    last = row.border - 1
    with torch.no_grad():
        cache = old(torch.tensor([row.ids[:last]]), use_cache=True).past_key_values
        logits = new(torch.tensor([row.ids[last:-1]]), past_key_values=cache).logits[0]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(row.ids[row.border :])[:, None])[:, 0]


@pytest.mark.parametrize("transfer", ["distributed", "disk"])
def test_a_recomputed_cache_is_that_of_the_new_weights(
    engine: EngineUnderTest, other_checkpoint: Path, transfer: Transfer
) -> None:
    """And what follows is what an engine with these makes of prompt and tokens so far; the embedded one to the bit."""
    new = load_reference(other_checkpoint)
    rows = update_in_flight(engine, other_checkpoint, "recompute", transfer)
    engine.flush()
    for row in rows:
        older = row.border - row.start
        expected = torch.cat(
            [
                log_probs_of(engine.reference, row.ids)[row.start - 1 : row.border - 1],
                log_probs_of(new, row.ids)[row.border - 1 :],
            ]
        )
        assert torch.allclose(row.log_probs, expected, atol=engine.tolerance, rtol=0)
        np.testing.assert_array_equal(row.routed, routed_by(new, row.ids))
        again = read_sample(
            engine.generate_one(row.ids[: row.border], replace(LONG, max_new_tokens=LONG.max_new_tokens - older))
        )
        assert row.ids[row.border :] == again.ids
        if engine.kind is Kind.EMBEDDED:
            assert row.sample.log_probs[older:] == again.log_probs


def test_a_kept_cache_stays_that_of_the_older_weights(
    engine: EngineUnderTest, other_checkpoint: Path, tmp_path: Path
) -> None:
    """What transformers caches is made with `kv_b_proj`, what the engines cache is not: it does not change here. A new
    request under another key finds nothing of older weights in the prefix cache."""
    weights = weights_of(other_checkpoint)
    weights |= {name: tensor for name, tensor in weights_of(engine.checkpoint).items() if "kv_b_proj" in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((engine.checkpoint / "config.json").read_bytes())
    new = load_reference(tmp_path)
    for row in update_in_flight(engine, tmp_path, "keep", "tensor"):
        newer = with_cache_of(engine.reference, new, row)
        expected = torch.cat([log_probs_of(engine.reference, row.ids)[row.start - 1 : row.border - 1], newer])
        assert torch.allclose(row.log_probs, expected, atol=engine.tolerance, rtol=0)
        assert not torch.allclose(newer, log_probs_of(new, row.ids)[row.border - 1 :], atol=10 * engine.tolerance)
        unread = row.border - 1
        np.testing.assert_array_equal(row.routed[:unread], routed_by(engine.reference, row.ids)[:unread])
    [answer] = engine.post("/generate", generation([PROMPT], GREEDY) | {"extra_key": "2"})
    fresh = read_sample(answer)
    expected = log_probs_of(new, PROMPT + fresh.ids)[len(PROMPT) - 1 :]
    assert torch.allclose(torch.tensor(fresh.log_probs), expected, atol=engine.tolerance, rtol=0)


def test_who_stands_still_without_an_update_goes_on_as_if_nothing_had_been(engine: EngineUnderTest) -> None:
    engine.flush()
    undisturbed = read_sample(engine.generate_one(PROMPT, LONG))
    engine.flush()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(engine.generate_one, PROMPT, LONG)
        for _ in range(3):
            time.sleep(0.02)
            engine.post("/pause_generation", {"mode": "in_place"})
            engine.post("/continue_generation")
        disturbed = read_sample(under_way.result(240))
    assert disturbed == undisturbed
    engine.post("/continue_generation")
    assert read_sample(engine.generate_one(PROMPT, replace(LONG, max_new_tokens=1))).ids == undisturbed.ids[:1]


def test_the_embedded_engine_does_not_flush_the_cache_of_who_stands_still(embedded: EngineUnderTest) -> None:
    with ThreadPoolExecutor(1) as pool:
        for attempt in range(ATTEMPTS):
            under_way = pool.submit(embedded.post, "/generate", REQUEST)
            time.sleep(0.02 * 1.4**attempt)
            embedded.post("/pause_generation", {"mode": "in_place"})
            status, told = embedded.update(weights_of(embedded.checkpoint))
            assert embedded.request("GET", "/health_generate")[0] == 503
            embedded.post("/continue_generation")
            under_way.result(240)
            if status == 400:
                break
        assert "running requests cannot be flushed: pause by retract" in told["error"]["message"]
