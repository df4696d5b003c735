import time

import pytest

from recipe.rewards.comparing import plainly_equal
from recipe.rewards.plain import MAX_ANSWER_CHARACTERS, canonical_integer

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("12", "12"),
        ("025", "25"),
        ("000", "0"),
        ("-0", "0"),
        ("+7", "7"),
        ("-012", "-12"),
        ("\N{MINUS SIGN}5", "-5"),
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"1,\!000", "1000"),
        ("12,345,678", "12345678"),
        (" $12$ ", "12"),
        ("12.", "12"),
        ("204.0", "204"),
        ("1 000", "1000"),
        ("12~345", "12345"),
        ("\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}", "12"),
        ("9" * 900, "9" * 900),
    ],
)
def test_plain_integers(text, integer):
    assert canonical_integer(text) == integer


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-",
            "1,00",
            "1,0000",
            ",100",
            "12,13",
            "1 2",
            "0 025",
            "204.5",
            "2\u2075",
            "\u2461",
            "1e3",
            "12%",
            "1/2",
            "x",
            "--1",
            "9" * 1001,
        ),
        "\N{ARABIC-INDIC DIGIT THREE}",
    ],
)
def test_what_is_no_plain_integer(text):
    assert canonical_integer(text) is None


@pytest.mark.parametrize(
    ("answer", "label", "equal"),
    [
        ("25", "025", True),
        ("025", "25", True),
        ("1000", "1,000", True),
        ("12", "13", False),
        ("-12", "12", False),
        (" x+1 ", "x+1", True),  # the same text
        ("204.0", "204", True),
        ("12 13", "25", False),  # they are not added
        (r"25_{16}", "25", False),  # and forget the base
        (r"\ge 25", "25", False),
        (r"25\text{ or 30}", "25", False),
        (r"x = 25 \text{ cm}", "25", True),
        (r"\frac{24}{2}", "12", True),
        ("12", r"\frac{24}{2}", True),
        (r"\sqrt{6}\sqrt{6}", "6", None),
        ("hello " * 1000, "12", False),  # too long to be worth algebra
    ],
)
def test_decides_what_takes_no_algebra(answer, label, equal):
    assert plainly_equal(answer, label) is equal


@pytest.mark.parametrize(
    "part",
    [
        *(
            "a",
            " a",
            "a.",
            r"\text{a}",
            r"\text{ cm }",
            "answer ",
            "the answer is ",
            r"\text{answer ",
            "=",
            "x=",
            "1=",
            "_a",
        ),
        *(
            "(1",
            "f(1)",
            "{",
            "{}",
            "{1}",
            "1 ",
            "1,000 ",
            r"\frac",
            r"\frac1",
            "(",
            "|",
            "|1",
            "^1",
            "!",
            "\\",
            r"\ ",
            "$ ",
        ),
        *(r"\textbf{", r"\mathrm{m}", r"\textcolor{red}", "**", "cm^2", "^{", r"^{\text{th}}", ":=", " ,", ". "),
    ],
)
@pytest.mark.parametrize("end", ["", "1", "!", "}", "=12"])
def test_no_answer_takes_long_to_read(part, end):
    started = time.thread_time()
    for answer in ("12 " + part * (990 // len(part)), part * (990 // len(part))):
        plainly_equal(answer[: MAX_ANSWER_CHARACTERS - len(end)] + end, "12")
    assert time.thread_time() - started < 2


@pytest.mark.parametrize("unit", ["9", "1,", "{,}", "$", "-", "\N{FULLWIDTH DIGIT ONE}", " "])
def test_a_megabyte_takes_no_time(unit):
    started = time.thread_time()
    plainly_equal(unit * 1_000_000, "12")
    assert time.thread_time() - started < 1
