"""The problems of an AIME file: jsonl, a problem a line, with `prompt` (a text, or chat messages) and `label`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.grading import aime_label_problem
from recipe.data.prompts import Prompt, PromptFormat, read_prompts
from recipe.data.tokenizer import load_tokenizer
from recipe.system.errors import UserError

LabelProblem = Callable[[str], str | None]
"""What keeps a label from being an answer, or None."""

INSTRUCTION = "Please reason step by step, and put your final answer, an integer between 0 and 999, within \\boxed{}."


@dataclass(frozen=True)
class ProblemFile:
    """Where problems come from."""

    path: Path
    input_key: str = "prompt"
    label_key: str = "label"
    id_key: str = "id"
    """May be missing: then problems are named by their lines."""
    instruction: str = INSTRUCTION
    apply_chat_template: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages."""
    label_problem: LabelProblem | None = aime_label_problem
    """What keeps a label from being an answer; None: labels are not looked at."""


def read_problems(file: ProblemFile, tokenizer_directory: Path, *, max_tokens: int) -> list[Prompt]:
    """The problems with their names, as the model reads them: with the instruction, in the chat template.

    Raises UserError for a tokenizer without the chat template and whatever is wrong in the file: besides what
    `read_prompts` finds (a label that is no answer, say), a name or a question that is there twice.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    if file.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {tokenizer_directory} has no chat template, which an evaluation needs: use the model's "
            "own, not that of a base model"
        )
    layout = PromptFormat(
        input_key=file.input_key,
        label_key=file.label_key,
        apply_chat_template=file.apply_chat_template,
        template_kwargs=file.template_kwargs,
        label_problem=file.label_problem,
        name_key=file.id_key,
        instruction=file.instruction,
    )
    problems = read_prompts(file.path, tokenizer, layout, max_tokens=max_tokens)
    _refuse_repetitions(file, problems)
    return problems


def _refuse_repetitions(file: ProblemFile, problems: Sequence[Prompt]) -> None:
    """Samples of one problem under two names would count as independent."""
    lines_of_names: dict[str, int] = {}
    lines_of_texts: dict[str, int] = {}
    for problem in problems:
        line = problem.index + 1
        earlier = lines_of_names.setdefault(problem.name, line)
        if earlier != line:
            raise UserError(f"{file.path}: lines {earlier} and {line} have the same {file.id_key!r}, {problem.name!r}")
        earlier = lines_of_texts.setdefault(problem.text, line)
        if earlier != line:
            raise UserError(f"{file.path}: lines {earlier} and {line} ask the same: keep each problem once")


def digest(problems: Sequence[Prompt]) -> str:
    """SHA-256 of all prompts and labels."""
    found = hashlib.sha256()
    for problem in problems:
        found.update(f"{problem.name}\0{problem.text}\0{problem.label}\0".encode())
    return found.hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
