"""Expressions, with every product written out."""

import pytest

from recipe.rewards.algebra import value_of
from recipe.rewards.tex_arithmetic import MAX_CHARACTERS, explicit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7(3)", "21"),
        ("(5)(5)5", "125"),
        (r"2\binom{5}{2}\binom52", "200"),
        ("{2}{3}", "6"),
        (r"\frac12(50)", "25"),
        (r"\frac{50}2", "25"),
        (r"8/2\cdot 4", "16"),
        ("1 + 4/2 - 3(4)", "-9"),
        ("3!(2)", "12"),
        (r"\sqrt[3]{27}\sqrt{4}", "6"),
        ("5|-5||5|", "125"),
        (r"\lfloor 5.9\rfloor\lceil 4.1\rceil", "25"),
        (r"\log_2 2^{25}", "25"),
        (r"\log_2(8)(3)", "9"),
        (r"\log(1000)/3", "1"),
        (r"(\log 1000)/3", "1"),
        (r"5\log 1000 + 10/2", "20"),
        (r"\frac{\log 1000}{3}", "1"),
        (r"{5 \choose 2}{3}", "30"),
        ("(3!)!", "720"),
        (r"5 \choose 2", "10"),
        ("--25", "25"),
        ("5 - -3", "8"),
        ("-5^2", "-25"),
        ("2^10", "1024"),
        ("0.1(250)", "25"),
        ("1.5^2", "9/4"),
        (r"\frac{24.9999999999}{1}", "249999999999/10000000000"),
        (r"(1+\sqrt2)^2+(1-\sqrt2)^2", "6"),
        (r"\frac{25\pi}{\pi}", "25"),
        (r"2\pi", "2*pi"),
    ],
)
def test_values_are_exact(text: str, value: str) -> None:
    expression = explicit(text)
    assert expression is not None
    assert value_of(expression) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "+",
            "25+",
            "5^",
            "5_2",
            "!5",
            "(5",
            "5)",
            "[5)",
            "|5",
            "*5",
            "12 13",
            "x",
            "5x",
            "5,5",
            "5=5",
            "5\\",
            "5²",
        ),
        *("٢٥", r"\frac{25}{}", r"\frac{1}", r"\sqrt", r"\foo{5}", r"36\frac12", r"5\,5", r"5\{2\}", r"\sin 5"),
        *(r"\log 1000/10", r"\log 1000 \cdot 5", r"\log_2 8 \div 3", r"\log 1000*5", r"\log 10(5)", r"\log 10\log 10"),
        *(r"\log{1000}/10", r"{\log 1000}/10", r"\log|1000|/10", r"\log[1000]/10", r"\log 0.1/5", r"\log\log 10/5"),
        *(r"\log+1000", r"\log(10)^2", r"\log(3)!", r"\log 10 \choose 2"),
        *("8/2(4)", r"50\div2(1)", "1/2{50}", "2^3^2", "2^{3}!", "3!!", "{3!}!", "5!^2", r"5\cdot{2+3}", "{1+2}^2"),
        r"5 \choose 2 \choose 1",
        "1+" * (MAX_CHARACTERS // 2) + "11",
    ],
)
def test_what_is_no_expression(text: str) -> None:
    assert explicit(text) is None
