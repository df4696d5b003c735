"""Prompt files of parquet. pyarrow is in the image and not on a CPU machine, where what it returns is put in its place;
the test with its own files is one of those that run in the image."""

import sys
from types import SimpleNamespace

import pytest

from recipe.data.prompts import PromptFormat, read_prompts
from recipe.data.tiny_tokenizer import build_tiny_tokenizer
from recipe.system.errors import UserError

OF_VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "user", "content": "1+2="}],
    "reward_model": {"ground_truth": "3", "style": "rule"},
}
LAYOUT = PromptFormat(label_key="reward_model.ground_truth", apply_chat_template=True)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer, monkeypatch):
    """Reads a file of parquet that has these rows, or whose reading fails so."""

    def read(rows, content=b"PAR1 and more"):
        def read_table(file):
            assert file.read() == content
            if isinstance(rows, Exception):
                raise rows
            return SimpleNamespace(to_pylist=lambda: rows)

        monkeypatch.setitem(sys.modules, "pyarrow.parquet", rows and SimpleNamespace(read_table=read_table))
        path = tmp_path / "train.parquet"
        path.write_bytes(content)
        return read_prompts(path, tokenizer, LAYOUT, max_tokens=20)

    return read


def test_rows_are_read_as_lines_are(read):
    found = read([OF_VERL, OF_VERL | {"reward_model": {"ground_truth": 4}}])
    assert [(prompt.index, prompt.text, prompt.label) for prompt in found] == [
        (0, "[gMASK]<sop><|user|>1+2=<|assistant|><think>", "3"),
        (1, "[gMASK]<sop><|user|>1+2=<|assistant|><think>", "4"),
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([OF_VERL, OF_VERL | {"reward_model": None}], "line 2: there is no field 'reward_model.ground_truth'"),
        ([OF_VERL | {"reward_model": {"ground_truth": b"3"}}], "line 1: the label \"b'3'\" is no answer"),
        ([OF_VERL | {"prompt": None}], "line 1: 'prompt' is neither a text nor a list of messages"),
        (ValueError("Parquet magic bytes not found in footer"), "cannot be read: Parquet magic bytes not found"),
        (None, "train.parquet is a parquet file, and this environment has no pyarrow to read it"),
    ],
)
def test_what_is_wrong_is_a_sentence(read, rows, sentence):
    with pytest.raises(UserError) as raised:
        read(rows)
    assert sentence in str(raised.value)


@pytest.mark.smoke
def test_a_file_that_pyarrow_writes_is_read(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([OF_VERL] * 3), path)
    found = read_prompts(path, tokenizer, LAYOUT, max_tokens=20)
    assert [(prompt.index, prompt.label) for prompt in found] == [(0, "3"), (1, "3"), (2, "3")]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(path, tokenizer, LAYOUT, max_tokens=20)
