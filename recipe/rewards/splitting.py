"""Splitting texts where no bracket is open."""

import re

_BRACKETS = re.compile(
    r"(?P<open>\\begin\{|\\lfloor|\\lceil|\\langle|\\\{|[({\[])|(?P<close>\\end\{|\\rfloor|\\rceil|\\rangle|\\\}|[)}\]])"
)


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """What stands between the separators that are in no brackets, and the separators."""
    parts: list[str] = []
    separators: list[str] = []
    depth, start, at = 0, 0, 0
    while at < len(text):
        found = separator.match(text, at) if depth == 0 else None
        if found is not None and found.end() > at:
            parts.append(text[start : found.start()])
            separators.append(found[0])
            start = at = found.end()
        elif bracket := _BRACKETS.match(text, at):
            depth += 1 if bracket["open"] else -1
            at = bracket.end()
            if bracket[0] in ("\\begin{", "\\end{"):
                depth += 1 if bracket["open"] else -1
        elif text[at] == "\\":
            at += 2 if text[at + 1 : at + 2] in ("\\", "{", "}") else 1
        else:
            at += 1
    return [*parts, text[start:]], separators


def has_list_in_brackets(text: str) -> bool:
    """Whether a comma stands in brackets that are seen in print, and not in braces within them."""
    opened: list[str] = []
    for match in re.finditer(rf"{_BRACKETS.pattern}|,", text):
        if match["open"]:
            opened.append(match[0])
        elif match["close"]:
            opened = opened[:-1]
        elif opened and opened[-1] in ("(", "[", "\\{", "\\langle"):
            return True
    return False
