"""Both engines answer in one form, with the numbers of transformers."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rollout_support import (
    CONTEXT,
    GREEDY,
    PROMPT,
    EngineUnderTest,
    disk_update,
    generation,
    log_probs_of,
    routed_by,
    tensor_update,
)

from recipe.config import Architecture
from recipe.data.tokenizer import load_tokenizer
from recipe.sampling.routing import RouterShape, read_routed_experts
from recipe.sampling.sampling_params import SamplingParams

ONE = SamplingParams(max_new_tokens=1)
LONG = replace(GREEDY, max_new_tokens=50)


def test_answer_has_sglangs_fields(engine: EngineUnderTest) -> None:
    answer = engine.generate_one(PROMPT, replace(GREEDY, max_new_tokens=3))
    meta = answer["meta_info"]
    assert isinstance(answer["text"], str)
    assert len(answer["output_ids"]) == 3
    assert meta["finish_reason"]["type"] == "length"
    assert meta["weight_version"] == "1"
    assert meta["weight_versions"] == [{"version": "1", "start": 0, "end": 3}]
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[token, None] for token in answer["output_ids"]]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_transformers(engine: EngineUnderTest, length: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(60, (length,), generator=generator).tolist()
    answer = engine.generate_one(prompt, SamplingParams(max_new_tokens=12, temperature=temperature), seed=5)
    ids = prompt + answer["output_ids"]
    got = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    assert torch.allclose(
        got, log_probs_of(engine.reference, ids, temperature)[length - 1 :], atol=engine.tolerance, rtol=0
    )


def test_greedy_tokens_equal_transformers_generate(engine: EngineUnderTest) -> None:
    expected = engine.reference.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    got = engine.generate_one(PROMPT, replace(GREEDY, max_new_tokens=20))
    assert got["output_ids"] == expected[0, len(PROMPT) :].tolist()


def test_log_probs_survive_json_exactly(engine: EngineUnderTest) -> None:
    answer = engine.generate_one(PROMPT, replace(ONE, max_new_tokens=8), seed=1)
    log_probs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert torch.tensor(log_probs, dtype=torch.float64).tolist() == torch.tensor(log_probs).double().tolist()


def test_batches_are_answered_in_order(engine: EngineUnderTest) -> None:
    body = generation([PROMPT, [5, 6], PROMPT], GREEDY)
    for length, params in enumerate(body["sampling_params"], 1):
        params["max_new_tokens"] = length
    answers = engine.post("/generate", body)
    assert [len(answer["output_ids"]) for answer in answers] == [1, 2, 3]


def test_more_sequences_than_rows(engine: EngineUnderTest) -> None:
    answers = engine.generate([PROMPT] * 130, replace(GREEDY, max_new_tokens=2))
    assert [len(answer["output_ids"]) for answer in answers] == [2] * 130


def test_stop_tokens_end_a_response_and_stay_in_its_ids(engine: EngineUnderTest) -> None:
    free = engine.generate_one(PROMPT, GREEDY)["output_ids"]
    stop = free[4]
    first = free.index(stop)
    answer = engine.generate_one(PROMPT, replace(GREEDY, stop_token_ids=(stop,)))
    assert answer["output_ids"] == free[: first + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_models_own_end_tokens_stop(engine: EngineUnderTest) -> None:
    ends = engine.reference.config.eos_token_id
    answers = engine.generate([PROMPT] * 40, SamplingParams(max_new_tokens=40, temperature=3.0))
    stopped = [answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert stopped
    assert all(answer["output_ids"][-1] in ends for answer in stopped)
    assert all(token not in ends for answer in answers for token in answer["output_ids"][:-1])


def test_stop_strings_are_cut_off(engine: EngineUnderTest) -> None:
    whole = engine.generate_one(PROMPT, GREEDY)["text"]
    stop = whole[3:5]
    cut = engine.generate_one(PROMPT, replace(GREEDY, stop=(stop,)))
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_text_has_special_tokens(embedded: EngineUnderTest) -> None:
    tokenizer = load_tokenizer(embedded.checkpoint)
    answers = embedded.generate([PROMPT] * 8, SamplingParams(max_new_tokens=40, temperature=3.0))
    for answer in answers:
        ids = answer["output_ids"]
        ends = answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert answer["text"] == tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=False)


def test_log_probs_of_what_is_read_equal_transformers(engine: EngineUnderTest) -> None:
    """Those of the prompt's tokens but the first, whatever temperature the response is sampled at."""
    prompts = [PROMPT, [5, 6] * 10, [9]]
    body = generation(prompts, replace(ONE, temperature=0.5)) | {"logprob_start_len": 0}
    for prompt, answer in zip(prompts, engine.post("/generate", body), strict=True):
        first, *told = answer["meta_info"]["input_token_logprobs"]
        assert first[:2] == [None, prompt[0]]
        assert [entry[1] for entry in told] == prompt[1:]
        if told:
            expected = log_probs_of(engine.reference, prompt, 1.0)
            got = torch.tensor([entry[0] for entry in told])
            assert torch.allclose(got, expected, atol=engine.tolerance, rtol=0)


def test_routed_experts_equal_transformers(engine: EngineUnderTest) -> None:
    """Those of all tokens but the last, also of a prompt that is cached, of one that others share, of a response that
    is gone on with."""
    shape = RouterShape.of(Architecture.from_checkpoint(engine.checkpoint))

    def check(prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
        body = generation(prompts, sampling) | {"return_routed_experts": True}
        whole = []
        for prompt, answer in zip(prompts, engine.post("/generate", body), strict=True):
            whole.append(prompt + answer["output_ids"])
            routed = read_routed_experts(answer["meta_info"]["routed_experts"], shape)
            np.testing.assert_array_equal(np.sort(routed, -1), routed_by(engine.reference, whole[-1]))
        return whole

    begun = check([PROMPT, PROMPT, [5, 6] * 10], replace(GREEDY, max_new_tokens=5))
    check(begun, SamplingParams(max_new_tokens=12, temperature=1.5))
    assert "routed_experts" not in engine.generate_one(PROMPT, ONE)["meta_info"]


@pytest.mark.parametrize(
    ("prompts", "sampling", "word"),
    [
        ([], ONE, "empty"),
        ([[1] * CONTEXT], ONE, "longer than the model's context length"),
        ([[1] * 10], SamplingParams(CONTEXT), "context length"),
        ([[5]], SamplingParams(1, temperature=-1), "temperature"),
        ([[5]], SamplingParams(1, top_p=0), "top_p"),
        ([[5]], SamplingParams(1, top_k=0), "top_k"),
    ],
)
def test_a_wrong_request_is_refused_in_sglangs_shape(
    engine: EngineUnderTest, prompts: list[list[int]], sampling: SamplingParams, word: str
) -> None:
    assert word in engine.refuse("/generate", generation(prompts, sampling))


@pytest.mark.parametrize(
    ("prompts", "word"),
    [
        ([[]], "empty"),
        ([[5, 100_000]], "out-of-vocabulary token id 100000"),
        ([[-1]], "out-of-vocabulary"),
    ],
)
def test_the_embedded_engine_refuses_what_sglang_should(
    embedded: EngineUnderTest, prompts: list[list[int]], word: str
) -> None:
    assert word in embedded.refuse("/generate", generation(prompts, ONE))


def _with(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update({name: value})


def _with_param(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["sampling_params"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_with("input_ids", [5]), "input_ids"),
        (_with("input_ids", [[5], [6]]), "sampling_params has 1 entries for 2 prompts"),
        (_with("sampling_params", {"max_new_tokens": 1}), "sampling_params"),
        (_with("sampling_params", [{}]), "sampling_seed"),
        (_with("return_logprob", False), "return_logprob"),
        (_with("text", "1+2="), "text"),
        (_with("rid", "mine"), "rid"),
        (_with("stream", False), "stream"),
        (_with("logprob_start_len", 3), "logprob_start_len"),
        (_with("top_logprobs_num", 2), "top_logprobs_num"),
        (_with_param("max_new_tokens", "many"), "max_new_tokens"),
        (_with_param("max_new_tokens", 0), "max_new_tokens"),
        (_with_param("skip_special_tokens", True), "skip_special_tokens"),
        (_with_param("stop", "x"), "stop"),
        (_with_param("n", 2), "n"),
        (_with_param("min_p", 0.1), "min_p"),
        (_with_param("ignore_eos", True), "ignore_eos"),
        (_with_param("no_stop_trim", True), "no_stop_trim"),
        (_with_param("frequency_penalty", 1.0), "frequency_penalty"),
    ],
)
def test_the_embedded_engine_refuses_what_nobody_sends(
    embedded: EngineUnderTest, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    body = generation([PROMPT], ONE)
    change(body)
    assert word in embedded.refuse("/generate", body)


GROUP = {"group_name": "one"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weights_from_tensor", tensor_update("", "2")),
        ("/update_weights_from_disk", disk_update("nowhere", "2")),
        (
            "/init_weights_update_group",
            GROUP | {"master_address": "", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"},
        ),
        ("/destroy_weights_update_group", GROUP),
        ("/weights_checker", {"action": "checksum"}),
        ("/begin_weight_update", {}),
        ("/end_weight_update", {}),
        ("/pause_generation", {"mode": "in_place"}),
        ("/continue_generation", {}),
        ("/abort_request", {"abort_all": True}),
        ("/flush_cache", {}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
        ("/resume_memory_occupation", {"tags": ["weights"]}),
    ],
)
def test_no_verb_takes_more_or_less_than_it_knows(embedded: EngineUnderTest, path: str, body: dict[str, Any]) -> None:
    assert "hurry" in embedded.refuse(path, body | {"hurry": True})
    for name in body:
        assert name in embedded.refuse(path, {other: value for other, value in body.items() if other != name})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 404),
        ("PUT", "/generate", 405),
        ("GET", "/flush_cache", 405),
        ("GET", "/weights_checker", 405),
    ],
)
def test_the_embedded_engine_has_no_other_verbs(embedded: EngineUnderTest, method: str, path: str, status: int) -> None:
    assert embedded.request(method, path)[0] == status


def test_a_wrong_request_harms_no_other(embedded: EngineUnderTest) -> None:
    answers: list[object] = []
    worker = threading.Thread(target=lambda: answers.append(embedded.generate_one(PROMPT, LONG)["output_ids"]))
    worker.start()
    embedded.refuse("/generate", generation([[100_000]], ONE))
    worker.join()
    assert answers == [embedded.generate_one(PROMPT, LONG)["output_ids"]]


def test_health_and_info(engine: EngineUnderTest) -> None:
    assert engine.request("GET", "/health_generate")[0] == 200
    info = engine.request("GET", "/model_info")[1]
    assert (info["model_path"], info["weight_version"]) == (str(engine.checkpoint), "1")
    assert "version" in engine.request("GET", "/server_info")[1]
