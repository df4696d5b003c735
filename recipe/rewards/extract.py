"""Finding the answer in a response. Every function is linear in the length of the text."""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from recipe.rewards.plain import braced

THINKING_START = "<think>"
THINKING_END = "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_UNBRACED = re.compile(r"[^\s$\\{}]+")
_ANSWER = re.compile(
    r"(?:answer|antwort|respuesta|r[ée]ponse|resposta|risposta|ответ|答案|答え|답)(?:\s+(?:is|ist|es))?\s*[*_]*\s*[:\uff1a]",
    re.IGNORECASE,
)
_DAPO_WINDOW = 300


@dataclass(frozen=True)
class Extraction:
    answer: str | None
    problem: str = ""
    """Why there is no answer; empty if there is one."""


def boxed_answer(text: str) -> Extraction:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, or the word after a `\boxed` without braces.

    Only the last box counts: if it is empty or never closed, the text has no answer, whatever was boxed before.
    """
    boxes = deque(_BOX.finditer(text), maxlen=1)
    if not boxes:
        return Extraction(None, "no \\boxed{}")
    last = boxes.pop()
    if text[last.end() : last.end() + 1] == "{":
        content = braced(text, last.end())
        if content is None:
            return Extraction(None, "the last \\boxed{ is never closed")
    else:
        word = _UNBRACED.match(text, last.end())
        content = word.group().rstrip(".,;:") if word else ""
    answer = content.strip()
    return Extraction(answer) if answer else Extraction(None, "the last \\boxed{} is empty")


def count_boxes(text: str) -> int:
    return sum(1 for _ in _BOX.finditer(text))


def boxed_after_thinking(text: str) -> Extraction:
    """`boxed_answer` of what follows the last `</think>`. The prompt opens the thinking part, so a response that never
    closes it is all thinking and has no answer."""
    _, closed, visible = text.rpartition(THINKING_END)
    return boxed_answer(visible) if closed else Extraction(None, "no </think>")


def opens_thinking(prompt: str) -> bool:
    """Whether what follows a prompt is a thought."""
    return prompt.rfind(THINKING_START) > prompt.rfind(THINKING_END)


def answer_after_thinking(text: str) -> Extraction:
    r"""The last `\boxed{}` after the thinking part: after the last `</think>`, or anywhere in a text without thinking
    tags. Nothing that follows an unclosed `<think>` is an answer, and what precedes it was taken back."""
    return _after_thinking(text, boxed_answer)


def answer_line_after_thinking(text: str) -> Extraction:
    r"""As `answer_after_thinking`, by DAPO's rule: the last "Answer: ..." or `\boxed{}` of the last 300 characters."""
    return _after_thinking(text, _answer_line)


def _after_thinking(text: str, extract: Callable[[str], Extraction]) -> Extraction:
    if opens_thinking(text):
        return Extraction(None, "the thinking part never ends")
    return extract(text.rpartition(THINKING_END)[2])


def _answer_line(text: str) -> Extraction:
    """DAPO's rule: within the last 300 characters, what follows the last "Answer:" on its line or the next one that is
    not empty, unboxed if boxed; else the last box."""
    tail = text[-_DAPO_WINDOW:]
    answers = deque(_ANSWER.finditer(tail), maxlen=1)
    if not answers:
        return boxed_answer(tail)
    lines = tail[answers.pop().end() :].split("\n")
    line = next((line for line in lines if any(map(str.isalnum, line))), None)
    if line is None:
        return Extraction(None, 'nothing after "Answer:"')
    boxed = boxed_answer(line)
    return Extraction(boxed.answer if boxed.answer is not None else line.strip().removeprefix("}").strip("*_ "))
