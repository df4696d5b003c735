"""Whether an answer plainly equals a label. What takes algebra is left to `recipe.rewards.algebra`."""

from recipe.rewards.integers import MAX_ANSWER_CHARACTERS, canonical_integer, equals_integer


def plainly_equal(answer: str, label: str) -> bool | None:
    """Whether answer and label are equal, or None where that takes algebra."""
    if answer.strip() == label.strip():
        return True
    wanted = canonical_integer(label)
    if wanted is not None:
        return equals_integer(answer, wanted)
    return False if len(answer) > MAX_ANSWER_CHARACTERS else None
