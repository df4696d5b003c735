"""Equality by math-verify, which may take any time and memory on a hostile answer: import this only in a process of
`recipe.rewards.workers`."""

from math_verify import parse, verify


def algebraically_equal(answer: str, label: str) -> bool:
    """Whether math-verify holds the two for equal. An answer that it cannot read is wrong.

    Raises ValueError for a label that it cannot read, and whatever math-verify raises in comparing.
    """
    gold = parse(f"\\boxed{{{label}}}", parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify cannot read the label {label!r}")
    predicted = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(gold, predicted, timeout_seconds=None, raise_on_error=True))
