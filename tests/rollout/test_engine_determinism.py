"""The same request gives the same bits, whatever else the engine does. SGLang promises that on GPUs only, where
`--sglang-enable-deterministic-inference` makes it use seeds."""

import random
import threading
import time
from typing import Any

from rollout_support import EngineUnderTest

from recipe.sampling.sampling_params import SamplingParams


def _requests(count: int) -> list[dict[str, Any]]:
    """Groups with prompts of very different lengths and mixed sampling parameters."""
    chance = random.Random(4)
    requests = []
    for number in range(count):
        prompt = [chance.randrange(60) for _ in range(chance.choice([1, 3, 12, 16, 17, 31, 40]))]
        params = [
            SamplingParams(
                max_new_tokens=chance.randint(1, 20),
                temperature=chance.choice([1.0, 1.0, 0.7, 0.0]),
                top_p=chance.choice([1.0, 0.9]),
                top_k=chance.choice([-1, 5]),
            ).request(100 * number + i)
            for i in range(chance.choice([1, 3, 8]))
        ]
        requests.append({"input_ids": [prompt] * len(params), "sampling_params": params, "return_logprob": True})
    return requests


def _tokens_and_log_probs(answers: list[dict[str, Any]]) -> list[Any]:
    return [(answer["output_ids"], answer["meta_info"]["output_token_logprobs"]) for answer in answers]


def _run(engine: EngineUnderTest, requests: list[dict[str, Any]], order: list[int], pause_s: float) -> list[Any]:
    """All requests at once, sent in `order` with pauses between; the results in the requests' order."""
    results: list[Any] = [None] * len(requests)

    def send(number: int) -> None:
        results[number] = _tokens_and_log_probs(engine.post("/generate", requests[number]))

    threads = [threading.Thread(target=send, args=(number,)) for number in order]
    for thread in threads:
        thread.start()
        time.sleep(pause_s)
    for thread in threads:
        thread.join()
    return results


def test_results_do_not_depend_on_order_or_company(embedded: EngineUnderTest) -> None:
    requests = _requests(16)
    alone = [_tokens_and_log_probs(embedded.post("/generate", request)) for request in requests]
    order = list(range(len(requests)))
    assert _run(embedded, requests, order, 0.0) == alone
    for seed, pause_s in ((1, 0.0), (2, 0.004), (3, 0.02)):
        random.Random(seed).shuffle(order)
        assert _run(embedded, requests, order, pause_s) == alone


def test_a_sample_does_not_depend_on_its_siblings(embedded: EngineUnderTest) -> None:
    request = _requests(3)[2]
    together = _tokens_and_log_probs(embedded.post("/generate", request))
    for prompt, params, expected in zip(request["input_ids"], request["sampling_params"], together, strict=True):
        body = {"input_ids": [prompt], "sampling_params": [params], "return_logprob": True}
        assert _tokens_and_log_probs(embedded.post("/generate", body)) == [expected]


def test_a_response_can_be_continued_where_it_was_cut(embedded: EngineUnderTest) -> None:
    prompt, border = [4, 8, 15, 16, 23], 5
    wholes = [embedded.generate_one(prompt, SamplingParams(max_new_tokens=12), seed)["output_ids"] for seed in range(8)]
    assert len({tuple(whole) for whole in wholes}) == 8
    long = [(seed, whole) for seed, whole in enumerate(wholes) if len(whole) > border]
    assert long
    for seed, whole in long:
        start = embedded.generate_one(prompt, SamplingParams(max_new_tokens=border), seed)["output_ids"]
        rest = embedded.generate_one(prompt + start, SamplingParams(max_new_tokens=12 - border), seed)["output_ids"]
        assert start + rest == whole
