"""Prompt files: jsonl or parquet, a question a line, in the format of dapo-math-17k."""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from recipe.system.errors import UserError, shortened
from recipe.system.json_text import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    index: int
    """The place of its line in the file, from 0."""
    messages: tuple[Message, ...]
    """A plain text in the file is one message of the user."""
    text: str
    """What the model reads: after the chat template, if it is applied."""
    ids: tuple[int, ...]
    label: str
    response: str | None = None
    """The turn that follows `text`, for supervised training."""
    response_ids: tuple[int, ...] = ()
    """The tokens of `response` and then the tokenizer's end-of-sequence token."""
    name: str = ""
    """The problem's name, where the file's problems have names."""
    rm_type: str = ""
    """The reward type that its line names."""
    source: str = ""
    """The name of its file, where a run has several."""


LabelCheck = Callable[[str], str | None]
"""What keeps a label from being an answer, or None."""


@dataclass(frozen=True)
class PromptFormat:
    """Where the parts of a line are, and what is made of them."""

    input_key: str = "prompt"
    """A text, or a list of messages with role and content."""
    label_key: str = "label"
    response_key: str | None = None
    """If given it is required of every line, and the label is not: the format of supervised training."""
    apply_chat_template: bool = False
    label_problem: LabelCheck | None = None
    """The reward's check of a label."""
    metadata_key: str | None = None
    """If given, a table of this key may name the reward type of its line, as `rm_type`."""
    label_problems: Mapping[str, LabelCheck] = field(default_factory=dict)
    """The check of a label of each reward type that a line may name."""
    name_key: str | None = None
    """If given, problems have names: a text or number, by default the number of the line, counted from 1."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages."""
    tool_key: str = "tools"
    """The line's tools, for the chat template, where it has any."""
    instruction: str = ""
    """What is added to the last message, unless that asks for a box itself."""


def read_prompts(
    path: Path,
    tokenizer: "PreTrainedTokenizerFast",
    layout: PromptFormat,
    *,
    max_tokens: int,
    drop_longer: bool = False,
) -> list[Prompt]:
    """The prompts of a file in the order of its lines; blank lines are skipped, and with `drop_longer` so are prompts
    of more than `max_tokens` tokens, with a warning.

    Raises UserError, which names the file and the line, for a file that is missing or empty, a line that is not JSON
    (one cut off, say), a field that is missing or of a wrong type, a label that is no answer, a reward type that there
    is not, a prompt that is too long, and a tokenizer without chat template where one is to be applied.
    """
    if layout.apply_chat_template and not tokenizer.chat_template:
        raise UserError(f"--apply-chat-template: the tokenizer in {tokenizer.name_or_path} has no chat template")
    entries = [
        _Line(path, index, layout, line)
        for index, line in enumerate(_read_lines(path))
        if not isinstance(line, str) or line.strip()
    ]
    if not entries:
        raise UserError(f"{path} holds no prompts")
    prompts = [entry.prompt(tokenizer) for entry in entries]
    prompts = _tokenized(prompts, tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= max_tokens]
    for entry, prompt in zip(entries, prompts, strict=True):
        if len(prompt.ids) > max_tokens and not (drop_longer and fitting):
            raise entry.error(f"the prompt has {len(prompt.ids)} tokens, but the context leaves room for {max_tokens}")
    if dropped := len(prompts) - len(fitting):
        logger.warning(
            "%d of %d prompts in %s have more than %d tokens and are left out", dropped, len(prompts), path, max_tokens
        )
    return fitting


_PARQUET = b"PAR1"
_OTHER_FORMATS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


def _read_lines(path: Path) -> Sequence[str | dict[str, Any]]:
    """The lines of a prompt file; of one of parquet its rows."""
    try:
        content = path.read_bytes()
        for magic, name in _OTHER_FORMATS.items():
            if content.startswith(magic):
                raise UserError(f"{path} is a {name} file: unpack or convert it to jsonl, a JSON object a line")
        if content.startswith(_PARQUET):
            return _parquet_rows(path, content)
        return content.decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts in {path} cannot be read: {error}") from error


def _parquet_rows(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Lists of structs become lists of tables, such as the messages of verl's `prompt`."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"{path} is a parquet file, and this environment has no pyarrow to read it, as the image has: convert it "
            "to jsonl, a JSON object a line"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
        return rows
    except Exception as error:  # whatever a file that is damaged makes of it
        raise UserError(f"the prompts in {path} cannot be read: {error}") from error


def _tokenized(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerFast") -> list[Prompt]:
    ids = tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)["input_ids"]
    prompts = [replace(prompt, ids=tuple(own)) for prompt, own in zip(prompts, ids, strict=True)]
    responses = [prompt.response for prompt in prompts if prompt.response is not None]
    if not responses:
        return prompts
    ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [replace(prompt, response_ids=(*own, end)) for prompt, own in zip(prompts, ids, strict=True)]


_ABSENT = object()


def _told(value: object) -> str:
    """A value as JSON has it."""
    return json.dumps(value, default=str)


class _Line:
    """A line of a prompt file, and where it is for the errors."""

    def __init__(self, path: Path, index: int, layout: PromptFormat, line: str | dict[str, Any]) -> None:
        self._where = f"{path}, line {index + 1}"
        self._index = index
        self._layout = layout
        self._fields = self._parsed(line) if isinstance(line, str) else line

    def error(self, problem: str) -> UserError:
        return UserError(f"{self._where}: {problem}")

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise self.error(f"not valid JSON, perhaps cut off ({error})") from error
        if not isinstance(fields, dict):
            raise self.error("not a JSON object")
        return fields

    def prompt(self, tokenizer: "PreTrainedTokenizerFast") -> Prompt:
        """The prompt without its tokens."""
        messages = self._instructed(self._messages())
        text = self._render(messages, tokenizer)
        rm_type = self._rm_type()
        label, response = self._label(rm_type), self._response()
        return Prompt(self._index, messages, text, (), label, response, name=self._name(), rm_type=rm_type)

    def _field(self, key: str, flag: str) -> Any:
        value = self._at(key)
        if value is _ABSENT:
            raise self.error(f"there is no field {key!r} ({flag}) among {', '.join(map(repr, self._fields))}")
        return value

    def _at(self, key: str) -> Any:
        """The field of a key; of one that is not there, what its parts between dots lead to."""
        if key in self._fields:
            return self._fields[key]
        value: Any = self._fields
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        return value

    def _messages(self) -> tuple[Message, ...]:
        key = self._layout.input_key
        match self._field(key, "--input-key"):
            case str(text) if text:
                return (Message("user", text),)
            case [_, *_] as messages if not self._layout.apply_chat_template:
                raise self.error(f"{key!r} is a list of {len(messages)} message(s), which needs --apply-chat-template")
            case [_, *_] as messages:
                return tuple(map(self._message, messages))
        raise self.error(f"{key!r} is neither a text nor a list of messages, or an empty one")

    def _message(self, value: object) -> Message:
        match value:
            case {"role": str(role), "content": str(content)}:
                return Message(role, content)
        raise self.error("a message has no role or no content, or one that is not a text")

    def _instructed(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        *before, last = messages
        if not self._layout.instruction or "\\boxed" in last.content:
            return messages
        return (*before, Message(last.role, f"{last.content}\n\n{self._layout.instruction}"))

    def _name(self) -> str:
        key = self._layout.name_key
        if key is None:
            return ""
        value = self._fields.get(key, self._index + 1)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise self.error(f"{key!r} is neither a text nor a number")
        return str(value).strip()

    def _render(self, messages: tuple[Message, ...], tokenizer: "PreTrainedTokenizerFast") -> str:
        if not self._layout.apply_chat_template:
            return messages[0].content
        turns = [{"role": message.role, "content": message.content} for message in messages]
        tools = self._fields.get(self._layout.tool_key)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise self.error(f"{self._layout.tool_key!r} is no list of tools (--tool-key)")
        named = {"tokenize": False, "add_generation_prompt": True, **self._layout.template_kwargs}
        try:
            return str(tokenizer.apply_chat_template(turns, tools=tools, **named))
        except (TemplateError, TypeError, ValueError) as error:
            raise self.error(f"the chat template refuses the messages: {error}") from error

    def _rm_type(self) -> str:
        key, known = self._layout.metadata_key, self._layout.label_problems
        metadata = None if key is None else self._at(key)
        named = metadata.get("rm_type") if isinstance(metadata, dict) else None
        if named in (None, ""):
            return ""
        if not isinstance(named, str) or named not in known:
            told = f"the rm_type {_told(named)} in {key!r} (--metadata-key)"
            raise self.error(f"{told} is no reward type: those are {', '.join(known)}")
        return named

    def _label(self, rm_type: str) -> str:
        layout = self._layout
        if layout.response_key is not None and self._at(layout.label_key) is _ABSENT:
            return ""
        value = self._field(layout.label_key, "--label-key")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"the label {_told(value)} is no answer: it is neither a text nor a number")
        label = str(value).strip()
        check = layout.label_problems.get(rm_type, layout.label_problem)
        problem = None if check is None else check(label)
        if problem is not None:
            raise self.error(f"the label {shortened(label)} is no answer: it {problem}")
        return label

    def _response(self) -> str | None:
        key = self._layout.response_key
        if key is None:
            return None
        value = self._field(key, "--response-key")
        if not isinstance(value, str) or not value:
            raise self.error(f"{key!r} is not a text, or an empty one")
        return value
