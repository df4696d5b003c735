"""The experts that an engine tells travel with their tokens, and nonsense about them is no answer."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_engines import FakeEngine, answers, group_of, serving
from rollout_support import make_prompt

from recipe.messages import RoutedExperts
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.rollout.pending import PendingGroup
from recipe.sampling.errors import EngineAnswerError
from recipe.sampling.routing import RouterShape, encode_routed_experts, read_routed_experts
from recipe.sampling.sample import FinishReason, Sample, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.sampling.sglang_response import read_sample, read_samples

SHAPE = RouterShape(layers=3, first_layer=1, top_k=2, experts=8)
SAMPLING = SamplingParams(max_new_tokens=4)


def told(tokens: int, first: int = 0) -> tuple[str, RoutedExperts]:
    """What an engine says of so many tokens, and what is to be read of it: layer 0 is dense, and says 0."""
    experts = np.zeros((tokens, 3, 2), dtype=np.int32)
    for n in range(tokens):
        experts[n, 1:] = [[(first + n) % 8, (first + n + 1) % 8], [(n + 3) % 8, (n + 5) % 8]]
    return encode_routed_experts(experts), experts[:, 1:].astype(np.uint8)


def test_the_layers_with_experts_are_read() -> None:
    encoded, expected = told(4)
    np.testing.assert_array_equal(read_routed_experts(encoded, SHAPE), expected)
    assert read_routed_experts(told(0)[0], SHAPE).shape == (0, 2, 2)


def as_base64(values: list[int]) -> str:
    return base64.b64encode(np.array(values, dtype="<i4").tobytes()).decode()


@pytest.mark.parametrize(
    ("routed", "word"),
    [
        (None, "--enable-return-routed-experts"),
        (7, "tells no routed_experts"),
        ("?" * 8, "no base64"),
        ("AAA=", "no base64"),
        (as_base64([0, 0, 1, 2]), "4 numbers"),
        (as_base64([0, 0, 1, 2, 3, 8]), "3 to 8|to 8 of 8"),
        (as_base64([0, 0, 1, 2, -1, 3]), "from -1"),
        (as_base64([0, 0, 1, 1, 2, 3]), "one expert twice"),
    ],
)
def test_what_is_not_the_routing_of_this_model_is_no_answer(routed: object, word: str) -> None:
    answer = answer_of([5], routed)
    with pytest.raises(EngineAnswerError, match=word):
        read_sample(answer, SHAPE)


def answer_of(ids: list[int], routed: object, reason: str = "stop") -> dict[str, Any]:
    return {
        "text": "x",
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "weight_version": "1",
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "routed_experts": routed,
        },
    }


def test_every_token_but_the_last_is_routed() -> None:
    samples = read_samples([answer_of([5, 6], told(4)[0])], [3], vocab_size=8, routers=SHAPE)
    assert samples[0].routed_experts is not None
    assert len(samples[0].routed_experts) == 4
    with pytest.raises(EngineAnswerError, match="of 3 tokens, not of 4"):
        read_samples([answer_of([5, 6], told(3)[0])], [3], vocab_size=8, routers=SHAPE)
    assert read_samples([answer_of([5, 6], told(3)[0])], [3], vocab_size=8)[0].routed_experts is None


def test_an_aborted_sample_may_tell_nothing() -> None:
    for routed, rows in ((told(4)[0], 4), (None, None)):
        answer = answer_of([5, 6], routed, "abort")
        if routed is None:
            del answer["meta_info"]["routed_experts"]
        found = read_sample(answer, SHAPE).routed_experts
        assert (None if found is None else len(found)) == rows


def test_a_sample_that_goes_on_is_routed_anew() -> None:
    """By the newest weights, all of it; and no more of it than there are tokens."""
    sample = Sample(0, 0, make_prompt(0, (1, 2)))
    sample.append_model([5, 6], [-0.1] * 2, ["1"] * 2, routed_experts=told(3)[1])
    with pytest.raises(ValueError, match="3 tokens of 5 are routed"):
        sample.append_model([7], [-0.1], ["2"], routed_experts=told(3)[1])
    assert sample.response_ids == [5, 6]
    newest = told(4, first=2)[1]
    sample.append_model([7], [-0.1], ["2"], routed_experts=newest)
    np.testing.assert_array_equal(sample.routed_experts, newest)
    sample.append_model([8], [-0.1], ["2"])
    np.testing.assert_array_equal(sample.routed_experts, newest)
    sample.cut(1)
    np.testing.assert_array_equal(sample.routed_experts, newest[:2])


async def test_engines_are_asked_for_the_routing_of_what_is_learned() -> None:
    async def tell(body: dict[str, Any]) -> web.Response:
        reply = json.loads(str(answers(body).text))
        for item, ids in zip(reply, body["input_ids"], strict=True):
            item["meta_info"]["routed_experts"] = told(len(ids))[0]
        return web.json_response(reply)

    async def ask(options: ClientOptions, *, routed: bool) -> tuple[SampleGroup, dict[str, Any]]:
        engine, group = FakeEngine(tell), group_of()
        async with serving(engine) as urls, RolloutClient(urls, options) as client:
            await client.generate(group, SAMPLING, [1, 2], routed=routed)
        return group, engine.bodies[0]

    group, body = await ask(ClientOptions(routers=SHAPE), routed=True)
    assert body["return_routed_experts"] is True
    for sample in group.samples:
        np.testing.assert_array_equal(sample.routed_experts, told(3)[1])
    for options, routed in ((ClientOptions(routers=SHAPE), False), (ClientOptions(), True)):
        group, body = await ask(options, routed=routed)
        assert "return_routed_experts" not in body
        assert group.samples[0].routed_experts is None


def test_a_checkpoint_keeps_the_routing_of_finished_samples() -> None:
    """One that goes on is read again, by the engine that goes on with it."""
    group = SampleGroup.of(make_prompt(0, (1, 2)), 3, 2)
    for sample, reason in zip(group.samples, (FinishReason.STOP, FinishReason.ABORT), strict=True):
        sample.append_model([5, 6], [-0.1] * 2, ["1"] * 2, routed_experts=told(3)[1])
        sample.finish_reason = reason
    kept = json.loads(json.dumps(PendingGroup(group, (1, 2)).as_json()))
    finished, aborted = PendingGroup.from_json(kept, lambda _: group.prompt).group.samples
    np.testing.assert_array_equal(finished.routed_experts, told(3)[1])
    assert aborted.routed_experts is None
    assert aborted.response_ids == [5, 6]
