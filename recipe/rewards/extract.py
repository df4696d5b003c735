"""Finding the answer in a response. Every function is linear in the length of the text."""

import re
from collections import deque
from dataclasses import dataclass

THINKING_END = "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_UNBRACED = re.compile(r"[^\s$\\{}]+")
_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
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


def boxed_after_thinking(text: str) -> Extraction:
    """`boxed_answer` of what follows the last `</think>`. The prompt opens the thinking part, so a response that never
    closes it is all thinking and has no answer."""
    _, closed, visible = text.rpartition(THINKING_END)
    return boxed_answer(visible) if closed else Extraction(None, "no </think>")


def dapo_answer(text: str) -> Extraction:
    """DAPO's rule: within the last 300 characters, the last line "Answer: ...", unboxed if boxed; else the last box."""
    tail = text[-_DAPO_WINDOW:]
    lines = _ANSWER_LINE.findall(tail)
    if not lines:
        return boxed_answer(tail)
    boxed = boxed_answer(lines[-1])
    answer = boxed.answer if boxed.answer is not None else lines[-1].strip()
    return Extraction(answer) if answer else Extraction(None, 'nothing after "Answer:"')


def braced(text: str, start: int) -> str | None:
    r"""What is between the brace at `start` and the one that closes it (`\{` and `\}` are letters, not braces)."""
    depth = 0
    position = start
    while position < len(text):
        match text[position]:
            case "\\":
                position += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
                if depth == 0:
                    return text[start + 1 : position]
        position += 1
    return None
