"""Whether an answer plainly equals a label. What takes algebra is left to `recipe.rewards.algebra`."""

from recipe.rewards.integers import MAX_ANSWER_CHARACTERS, Reading, canonical_integer, read_answer


def plainly_equal(answer: str, label: str) -> bool | None:
    """Whether answer and label are equal, or None where that takes algebra."""
    if answer.strip() == label.strip():
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    integer = canonical_integer(label)
    return None if integer is None else equals_integer(read_answer(answer), integer)


def equals_integer(reading: Reading, integer: str) -> bool | None:
    """Whether what an answer says is the integer, in its canonical form; None where values must be computed first."""
    if not reading.is_number or any(number != integer for number in reading.integers):
        return False
    return None if reading.expressions else True
