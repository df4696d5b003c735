import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from recipe.data.tiny_tokenizer import CHARACTERS, EOS_TOKENS, VISIBLE_TOKENS, VOCAB_SIZE, build_tiny_tokenizer

BUILT = build_tiny_tokenizer()
TOKENS = st.sampled_from([*CHARACTERS, *BUILT.get_vocab(), "\\boxed", " {", "  "])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    BUILT.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "glm4_moe_lite"}))
    return AutoTokenizer.from_pretrained(directory)


def test_every_id_below_a_multiple_of_64_is_a_token():
    assert len(BUILT) == VOCAB_SIZE
    assert VOCAB_SIZE % 64 == 0
    assert sorted(BUILT.get_vocab().values()) == list(range(VOCAB_SIZE))


@given(st.lists(TOKENS).map("".join))
def test_decoding_gives_the_text_back(text):
    assert BUILT.decode(BUILT.encode(text)) == text


def test_an_answer_takes_few_tokens(loaded):
    assert loaded.tokenize("</think>\\boxed{12}<|user|>") == ["</think>", "\\boxed{", "1", "2", "}", "<|user|>"]


def test_saved_and_loaded_by_transformers_it_is_the_same(loaded):
    text = "<think>a  b</think> \\boxed{-7}\n<|user|>"
    assert loaded.encode(text) == BUILT.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == BUILT.chat_template
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|endoftext|>")


def test_characters_that_it_does_not_know_do_not_vanish():
    assert BUILT.decode(BUILT.encode("1é2")) == "1<|unknown|>2"


def test_a_grader_sees_the_end_of_thinking_but_no_turn_tokens(loaded):
    ids = loaded.encode("x</think>\\boxed{1}<|user|>")
    assert loaded.decode(ids, skip_special_tokens=True) == "x</think>\\boxed{1}"
    assert set(VISIBLE_TOKENS).isdisjoint(loaded.all_special_tokens)


def test_the_three_end_tokens_are_single_ids():
    assert [len(BUILT.encode(token)) for token in EOS_TOKENS] == [1, 1, 1]


def test_chat_template_opens_the_thinking_as_glm_does(loaded):
    rendered = loaded.apply_chat_template(
        [{"role": "user", "content": "1+2="}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "[gMASK]<sop><|user|>1+2=<|assistant|><think>"
    assert len(loaded.encode(rendered)) == 9


def test_chat_template_of_a_whole_conversation(loaded):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "\\boxed{3}"},
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "</think>\\boxed{4}"},
    ]
    assert loaded.apply_chat_template(turns, tokenize=False) == (
        "[gMASK]<sop><|system|>Be brief.<|user|>1+2=<|assistant|></think>\\boxed{3}"
        "<|user|>2+2=<|assistant|></think>\\boxed{4}"
    )


def test_thinking_can_be_switched_off(loaded):
    rendered = loaded.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered.endswith("<|assistant|></think>")
