import json
import subprocess
import sys
from dataclasses import replace

import pytest

from recipe.data.prompts import Message, PromptFormat, read_prompts
from recipe.data.tiny_tokenizer import build_tiny_tokenizer
from recipe.data.tokenizer import load_tokenizer
from recipe.rewards import REWARD_RULES, RewardType
from recipe.system.errors import UserError

CHAT = PromptFormat(apply_chat_template=True, label_problem=REWARD_RULES[RewardType.DEEPSCALER].label_problem)
GOOD = {"prompt": [{"role": "user", "content": "1+2="}], "label": "3"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_a_prompt_is_rendered_and_tokenised_as_the_model_will_read_it(write, tokenizer):
    (prompt,) = read_prompts(write(GOOD), tokenizer, CHAT, max_tokens=9)
    assert prompt.text == "[gMASK]<sop><|user|>1+2=<|assistant|><think>"
    assert prompt.ids == tuple(tokenizer.encode(prompt.text))
    assert prompt.messages == (Message("user", "1+2="),)
    assert (prompt.index, prompt.label, prompt.response, prompt.response_ids) == (0, "3", None, ())


def test_a_text_is_a_message_of_the_user_with_a_template_and_itself_without(write, tokenizer):
    path = write({"prompt": "1+2=", "label": 3})
    (chat,) = read_prompts(path, tokenizer, CHAT, max_tokens=100)
    (plain,) = read_prompts(path, tokenizer, PromptFormat(), max_tokens=100)
    assert chat.text == "[gMASK]<sop><|user|>1+2=<|assistant|><think>"
    assert (plain.text, plain.label) == ("1+2=", "3")


def test_keys_can_be_named_and_blank_lines_are_skipped(write, tokenizer):
    path = write({"q": "1", "a": "1"}, "", {"q": "2", "a": "2"}, "")
    prompts = read_prompts(path, tokenizer, PromptFormat(input_key="q", label_key="a"), max_tokens=100)
    assert [(prompt.index, prompt.text, prompt.label) for prompt in prompts] == [(0, "1", "1"), (2, "2", "2")]


def test_supervised_lines_carry_a_response_that_ends(write, tokenizer):
    path = write({"prompt": "1+2=", "response": "</think>\\boxed{3}"})
    (prompt,) = read_prompts(path, tokenizer, PromptFormat(response_key="response"), max_tokens=100)
    assert prompt.response == "</think>\\boxed{3}"
    assert tokenizer.decode(prompt.response_ids) == "</think>\\boxed{3}<|endoftext|>"
    assert prompt.label == ""


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ('{"prompt": [{"role": "us', "not valid JSON, perhaps cut off"),
        ('["prompt"]', "not a JSON object"),
        ({"label": "3"}, "no field 'prompt' (--input-key) among 'label'"),
        ({"prompt": "1+2="}, "no field 'label' (--label-key) among 'prompt'"),
        (GOOD | {"prompt": []}, "neither a text nor a list of messages"),
        (GOOD | {"prompt": 7}, "neither a text nor a list of messages"),
        (GOOD | {"prompt": [{"role": "user"}]}, "no role or no content"),
        (GOOD | {"prompt": [{"role": "wizard", "content": "x"}]}, "the chat template refuses the messages"),
        (GOOD | {"label": ""}, "the label '' is no answer: it has neither a digit nor a letter"),
        (GOOD | {"label": " -- "}, "the label '--' is no answer"),
        (GOOD | {"label": r"1, \ldots, n"}, "is no answer: it has"),
        (GOOD | {"label": "NaN"}, "the label 'NaN' is no answer: it is not a number"),
        ('{"prompt": "1+2=", "label": ' + "9" * 5000 + "}", "not valid JSON"),
        (GOOD | {"label": None}, "the label null is no answer"),
        (GOOD | {"label": ["3"]}, 'the label ["3"] is no answer'),
        (GOOD | {"label": True}, "the label true is no answer"),
        (f'{{"prompt": "x", "label": {"9" * 5000}}}', "not valid JSON"),
        (GOOD | {"tools": "calculator"}, "'tools' is no list of tools (--tool-key)"),
        ('{"prompt": "\\ud800", "label": "3"}', "not valid JSON"),
        ('{"prompt": "x", "label": NaN}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (GOOD | {"prompt": "1" * 50}, "the prompt has 55 tokens, but the context leaves room for 20"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(write, tokenizer, bad, problem):
    path = write(GOOD, bad, GOOD)
    with pytest.raises(UserError) as raised:
        read_prompts(path, tokenizer, CHAT, max_tokens=20)
    assert str(raised.value).startswith(f"{path}, line 2: ")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_prompts_that_are_too_long_are_left_out_of_training(write, tokenizer, caplog):
    path = write(GOOD, GOOD | {"prompt": "1" * 50}, GOOD)
    prompts = read_prompts(path, tokenizer, CHAT, max_tokens=20, drop_longer=True)
    assert [prompt.index for prompt in prompts] == [0, 2]
    assert caplog.messages == [f"1 of 3 prompts in {path} have more than 20 tokens and are left out"]
    with pytest.raises(UserError, match="the prompt has 55 tokens"):
        read_prompts(write(GOOD | {"prompt": "1" * 50}), tokenizer, CHAT, max_tokens=20, drop_longer=True)


def test_the_chat_template_is_given_tools_and_what_the_user_says(write, tokenizer):
    tokenizer.chat_template = "{{ enable_thinking }} {{ tools | length if tools else 0 }} {{ messages[0].content }}"
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    layout = PromptFormat(apply_chat_template=True, template_kwargs={"enable_thinking": False}, tool_key="t")
    prompts = read_prompts(write(GOOD | {"t": [tool]}, GOOD), tokenizer, layout, max_tokens=100)
    assert [prompt.text for prompt in prompts] == ["False 1 1+2=", "False 0 1+2="]


def test_a_byte_order_mark_is_skipped_and_other_formats_are_named(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_prompts(path, tokenizer, CHAT, max_tokens=20)) == 1
    path.write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match="is a gzip file: unpack or convert it to jsonl"):
        read_prompts(path, tokenizer, CHAT, max_tokens=20)


def test_dapo_wants_integers(write, tokenizer):
    layout = PromptFormat(label_problem=REWARD_RULES[RewardType.DAPO].label_problem)
    with pytest.raises(UserError, match=r"line 1: the label '1/2' is no answer: it is no integer"):
        read_prompts(write({"prompt": "x", "label": "1/2"}), tokenizer, layout, max_tokens=20)


REWARDS = PromptFormat(
    label_problem=REWARD_RULES[RewardType.DEEPSCALER].label_problem,
    metadata_key="metadata",
    label_problems={kind: rule.label_problem for kind, rule in REWARD_RULES.items()},
)


def test_a_line_may_name_its_reward_whose_check_its_label_then_passes(write, tokenizer):
    half = {"prompt": "x", "label": "1/2"}
    lines = [half, half | {"metadata": {"rm_type": "math"}}, half | {"metadata": {}}, half | {"metadata": "of a crawl"}]
    found = read_prompts(write(*lines), tokenizer, REWARDS, max_tokens=20)
    assert [prompt.rm_type for prompt in found] == ["", "math", "", ""]
    path = write(half, half | {"metadata": {"rm_type": "dapo"}})
    with pytest.raises(UserError, match=r"line 2: the label '1/2' is no answer: it is no integer"):
        read_prompts(path, tokenizer, REWARDS, max_tokens=20)
    assert read_prompts(path, tokenizer, PromptFormat(), max_tokens=20)[1].rm_type == "", "nobody asked for it"
    elsewhere = replace(REWARDS, metadata_key="extra.info")
    [prompt] = read_prompts(write(half | {"extra": {"info": {"rm_type": "math"}}}), tokenizer, elsewhere, max_tokens=20)
    assert prompt.rm_type == "math"


@pytest.mark.parametrize("named", ["gpqa", 7, ["math"]])
def test_a_reward_that_there_is_not_is_named(write, tokenizer, named):
    path = write({"prompt": "x", "label": "1", "metadata": {"rm_type": named}})
    with pytest.raises(UserError) as raised:
        read_prompts(path, tokenizer, REWARDS, max_tokens=20)
    assert str(raised.value) == (
        f"{path}, line 1: the rm_type {json.dumps(named)} in 'metadata' (--metadata-key) is no reward type: those are "
        "deepscaler, math, dapo"
    )


def test_dots_in_a_key_lead_into_tables_where_no_field_has_that_name(write, tokenizer):
    layout = PromptFormat(label_key="reward_model.ground_truth")
    inner = {"prompt": "x", "reward_model": {"ground_truth": "3"}}
    found = read_prompts(write(inner, inner | {"reward_model.ground_truth": "4"}), tokenizer, layout, max_tokens=20)
    assert [prompt.label for prompt in found] == ["3", "4"]
    for reward_model in ({}, "3", None):
        with pytest.raises(UserError, match=r"line 1: there is no field 'reward_model.ground_truth' \(--label-key\)"):
            read_prompts(write(inner | {"reward_model": reward_model}), tokenizer, layout, max_tokens=20)


def test_messages_need_the_chat_template(write, tokenizer):
    with pytest.raises(UserError, match=r"line 1: 'prompt' is a list .* needs --apply-chat-template"):
        read_prompts(write(GOOD), tokenizer, PromptFormat(), max_tokens=20)


def test_a_missing_response_is_named(write, tokenizer):
    with pytest.raises(UserError, match=r"no field 'response' \(--response-key\)"):
        read_prompts(write(GOOD), tokenizer, PromptFormat("prompt", "label", "response", True), max_tokens=20)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(write, tokenizer, content):
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(write(content), tokenizer, CHAT, max_tokens=20)


def test_a_missing_file_and_one_that_is_no_text_are_errors(tmp_path, tokenizer):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_prompts(tmp_path / name, tokenizer, CHAT, max_tokens=20)


def test_a_tokenizer_without_chat_template_is_an_error(write):
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        read_prompts(write(GOOD), tokenizer, CHAT, max_tokens=20)


def test_a_checkpoint_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_loaded(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("1+2=") == tokenizer.encode("1+2=")


READING = """
import sys
from pathlib import Path
from recipe.data.tokenizer import READER_OF_GGUF, load_tokenizer
assert load_tokenizer(Path(sys.argv[1])).encode("1+2=")
assert "torch" not in sys.modules
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
assert callable(load_gguf_checkpoint)
"""


def test_a_tokenizer_is_read_without_torch_and_leaves_transformers_whole(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    ended = subprocess.run([sys.executable, "-c", READING, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
