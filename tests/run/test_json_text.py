"""Files that are not what they should be: one sentence each, whatever lies in them."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.config import Architecture
from recipe.data.prompts import PromptFormat, read_prompts
from recipe.data.tokenizer import load_tokenizer
from recipe.system.errors import UserError
from recipe.system.json_text import parse_json, read_json
from recipe.weights.checkpoints import rollouts_in
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.tiny import main as write_tiny

JUNK: tuple[Any, ...] = (None, True, -1, 0, 1.5, "", "x", "\\ud800", [], {}, [[1]], {"a": 1}, 10**400, "z" * 5000)


@pytest.mark.parametrize("text", ["[" * 100_000, "NaN", "[1e999, Infinity]", '"\\ud800"', "{", "", "\ud800"])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|surrogate"):
        parse_json(text)


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_json(b"\xef\xbb\xbf{}") == {}


def test_the_sentence_says_where_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"a": {"b": [1]}}')
    with pytest.raises(UserError, match=r"index.json is not what it should be at a.b \(Input .* string\): restore it"):
        read_json(path, dict[str, dict[str, str]], "restore it")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tiny", "--output", str(folder), "--seed", "1"])
        write_tiny()
    index = dict.fromkeys(HuggingFaceCheckpoint(folder).headers, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "progress.json").write_text(json.dumps({"rollouts": 1}))
    (folder / "train.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}], "label": "2"}))
    return folder


def read_data(folder: Path) -> None:
    layout = PromptFormat("prompt", "label", apply_chat_template=True)
    read_prompts(folder / "train.jsonl", load_tokenizer(folder), layout, max_tokens=50)


READERS = {
    "config.json": Architecture.from_checkpoint,
    "model.safetensors.index.json": lambda folder: HuggingFaceCheckpoint(folder).headers,
    "progress.json": rollouts_in,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "train.jsonl": read_data,
}


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_in_one_sentence(name: str, checkpoint: Path) -> None:
    path, draw = checkpoint / name, random.Random(name)
    original = path.read_bytes()
    try:
        for _ in range(1000 if "token" not in name else 60):
            path.write_bytes(mutated(original, draw))
            began = time.process_time()
            told = refusal(READERS[name], checkpoint)
            assert "\n" not in told or " problems:\n" in told
            assert len(told) < 3000
            assert time.process_time() - began < 5
    finally:
        path.write_bytes(original)


def refusal(reader: Callable[[Path], object], folder: Path) -> str:
    """The sentence that a reader refuses its file with; empty if it takes it."""
    try:
        reader(folder)
    except UserError as error:
        return str(error)
    return ""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The JSON document with something else in one place, or cut off, or with bytes that are none of its own."""
    match draw.randrange(4):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            at = draw.randrange(len(content))
            return content[:at] + bytes(draw.randrange(256) for _ in range(3)) + content[at + 1 :]
        case _:
            return json.dumps(replaced(json.loads(content), draw)).encode()


def replaced(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """A copy with junk in place of one of its parts, or of all of it."""
    if not value or not isinstance(value, dict | list) or draw.random() < (0.02, 0.15, 0.3)[min(depth, 2)]:
        return draw.choice(JUNK)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    copy[key] = replaced(value[key], draw, depth + 1)
    return copy
