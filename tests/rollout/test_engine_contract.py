"""Both engines answer in one form, with the numbers of transformers."""

import threading

import pytest
import torch
from rollout_support import CONTEXT, EngineUnderTest, log_probs_of

from recipe.data.tokenizer import load_tokenizer

PROMPT = [7, 3, 9, 11, 4, 8, 20]


def test_answer_has_sglangs_fields(engine: EngineUnderTest) -> None:
    body = {
        "input_ids": PROMPT,
        "return_logprob": True,
        "logprob_start_len": 0,
        "rid": "mine",
        "sampling_params": {"max_new_tokens": 3, "ignore_eos": True},
    }
    engine.flush()
    answer = engine.post("/generate", body)
    meta = answer["meta_info"]
    assert isinstance(answer["text"], str)
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (len(PROMPT), 3, 0)
    assert meta["weight_version"] == "1"
    assert meta["weight_versions"] == [{"version": "1", "start": 0, "end": 3}]
    assert meta["e2e_latency"] > 0
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[token, None] for token in answer["output_ids"]]
    assert meta["input_token_logprobs"][0] == [None, PROMPT[0], None]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT


def test_log_probs_are_not_sent_unasked(engine: EngineUnderTest) -> None:
    meta = engine.post("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}})["meta_info"]
    assert "output_token_logprobs" not in meta
    assert "input_token_logprobs" not in meta
    assert engine.generate(PROMPT, max_new_tokens=1)["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 50])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_transformers(engine: EngineUnderTest, length: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(60, (length,), generator=generator).tolist()
    sampling = {"max_new_tokens": 12, "ignore_eos": True, "temperature": temperature, "sampling_seed": 5}
    body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0, "sampling_params": sampling}
    answer = engine.post("/generate", body)
    ids = prompt + answer["output_ids"]
    got = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    assert torch.allclose(
        got, log_probs_of(engine.reference, ids, temperature)[length - 1 :], atol=engine.tolerance, rtol=0
    )
    prompt_log_probs = torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])
    assert torch.allclose(prompt_log_probs, log_probs_of(engine.reference, prompt), atol=engine.tolerance, rtol=0)


def test_greedy_tokens_equal_transformers_generate(engine: EngineUnderTest) -> None:
    expected = engine.reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :]
    got = engine.generate(PROMPT, temperature=0, max_new_tokens=20, ignore_eos=True)
    assert got["output_ids"] == expected.tolist()


def test_log_probs_survive_json_exactly(engine: EngineUnderTest) -> None:
    answer = engine.generate(PROMPT, max_new_tokens=8, sampling_seed=1)
    log_probs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert torch.tensor(log_probs, dtype=torch.float64).tolist() == torch.tensor(log_probs).double().tolist()


def test_batches_are_answered_in_order(engine: EngineUnderTest) -> None:
    prompts = [PROMPT, [5, 6], PROMPT]
    params = [{"max_new_tokens": n, "ignore_eos": True, "sampling_seed": n} for n in (1, 2, 3)]
    body = {"input_ids": prompts, "sampling_params": params, "rid": ["a", "b", "c"]}
    engine.flush()
    answers = engine.post("/generate", body)
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    assert [len(answer["output_ids"]) for answer in answers] == [1, 2, 3]
    assert all(answer["meta_info"]["cached_tokens"] in (0, len(PROMPT)) for answer in answers)
    assert isinstance(engine.generate([PROMPT], max_new_tokens=1), list)
    assert len(engine.generate(PROMPT, max_new_tokens=1, n=3)) == 3


def test_more_sequences_than_rows(engine: EngineUnderTest) -> None:
    answers = engine.generate([PROMPT] * 130, max_new_tokens=2, ignore_eos=True)
    assert [len(answer["output_ids"]) for answer in answers] == [2] * 130


def test_stop_tokens_end_a_response_and_stay_in_its_ids(engine: EngineUnderTest) -> None:
    free = engine.generate(PROMPT, temperature=0, max_new_tokens=10, ignore_eos=True)["output_ids"]
    stop = free[4]
    first = free.index(stop)
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=10, stop_token_ids=[stop])
    assert answer["output_ids"] == free[: first + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    ignored = engine.generate(PROMPT, temperature=0, max_new_tokens=10, stop_token_ids=[stop], ignore_eos=True)
    assert ignored["output_ids"] == free


def test_the_models_own_end_tokens_stop(engine: EngineUnderTest) -> None:
    ends = engine.reference.config.eos_token_id
    answers = engine.generate([PROMPT] * 40, max_new_tokens=40, temperature=3.0)
    stopped = [answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert stopped
    assert all(answer["output_ids"][-1] in ends for answer in stopped)
    assert all(token not in ends for answer in answers for token in answer["output_ids"][:-1])


def test_stop_strings_are_cut_off_unless_told_otherwise(engine: EngineUnderTest) -> None:
    common = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "skip_special_tokens": False}
    whole = engine.generate(PROMPT, **common)["text"]
    stop = whole[3:5]
    cut = engine.generate(PROMPT, stop=stop, **common)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = engine.generate(PROMPT, stop=[stop], no_stop_trim=True, **common)
    assert kept["text"] == whole[: whole.index(stop) + len(stop)]


def test_text_is_an_input_too(engine: EngineUnderTest) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 6}
    ids = load_tokenizer(engine.checkpoint)("12+3=")["input_ids"]
    by_text = engine.post("/generate", {"text": "12+3=", "sampling_params": sampling})
    assert by_text["output_ids"] == engine.generate(ids, **sampling)["output_ids"]


def test_top_log_probs_begin_with_the_greedy_token(engine: EngineUnderTest) -> None:
    body = {
        "input_ids": PROMPT,
        "return_logprob": True,
        "top_logprobs_num": 3,
        "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True},
    }
    answer = engine.post("/generate", body)
    top = answer["meta_info"]["output_top_logprobs"]
    assert [entries[0][:2] for entries in top] == [entry[:2] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert [len(entries) for entries in top] == [3, 3]


def test_a_prompt_can_be_scored_without_generating(engine: EngineUnderTest) -> None:
    body = {
        "input_ids": PROMPT,
        "return_logprob": True,
        "logprob_start_len": 2,
        "sampling_params": {"max_new_tokens": 0},
    }
    answer = engine.post("/generate", body)
    assert answer["output_ids"] == []
    assert [entry[1] for entry in answer["meta_info"]["input_token_logprobs"]] == PROMPT[2:]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input_ids": []}, "empty"),
        ({}, "should be provided"),
        ({"input_ids": [1] * CONTEXT}, "longer than the model's context length"),
        ({"input_ids": [1] * 10, "sampling_params": {"max_new_tokens": CONTEXT}}, "context length"),
        ({"input_ids": [5], "sampling_params": {"temperature": -1, "max_new_tokens": 1}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"top_p": 0, "max_new_tokens": 1}}, "top_p"),
        ({"input_ids": [5], "sampling_params": {"top_k": 0, "max_new_tokens": 1}}, "top_k"),
        ({"input_ids": [5], "sampling_params": {"min_p": 2, "max_new_tokens": 1}}, "min_p"),
        ({"input_ids": [[5], [6]], "rid": ["a", "a"], "sampling_params": {"max_new_tokens": 1}}, "Duplicate"),
    ],
)
def test_a_wrong_request_is_refused_in_sglangs_shape(engine: EngineUnderTest, body: object, word: str) -> None:
    assert word in engine.refuse("/generate", body)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input_ids": [[]]}, "empty"),
        ({"input_ids": [5, 100_000]}, "out-of-vocabulary token id 100000"),
        ({"input_ids": [-1]}, "out-of-vocabulary"),
        ({"input_ids": [[5], [6]], "sampling_params": [{"max_new_tokens": 1}]}, "sampling_params has 1 entries"),
        ({"input_ids": [5], "stream": True}, "stream"),
    ],
)
def test_the_embedded_engine_refuses_what_sglang_should(embedded: EngineUnderTest, body: object, word: str) -> None:
    assert word in embedded.refuse("/generate", body)


def test_a_malformed_request_is_refused_in_sglangs_shape(embedded: EngineUnderTest) -> None:
    for sampling in ({"max_new_tokens": "many"}, {"frequency_penalty": 1.0}):
        status, answer = embedded.request("POST", "/generate", {"input_ids": [1], "sampling_params": sampling})
        assert status == 400
        assert answer["object"] == "error"
        assert answer["code"] == 400
        assert next(iter(sampling)) in answer["message"]


def test_a_wrong_request_harms_no_other(embedded: EngineUnderTest) -> None:
    answers: list[object] = []
    body = {"max_new_tokens": 30, "ignore_eos": True, "sampling_seed": 3}
    worker = threading.Thread(target=lambda: answers.append(embedded.generate(PROMPT, **body)["output_ids"]))
    worker.start()
    embedded.refuse("/generate", {"input_ids": [100_000]})
    worker.join()
    assert answers == [embedded.generate(PROMPT, **body)["output_ids"]]


def test_health_and_info(engine: EngineUnderTest) -> None:
    assert engine.request("GET", "/health")[0] == 200
    assert engine.request("GET", "/health_generate")[0] == 200
    info = engine.request("GET", "/model_info")[1]
    assert (info["weight_version"], info["model_type"], info["is_generation"]) == ("1", "glm4_moe_lite", True)
    assert engine.request("GET", "/server_info")[1]["context_length"] == CONTEXT
