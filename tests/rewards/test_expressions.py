"""Expressions and their exact values."""

import pytest

from recipe.rewards.algebra import as_sympy, same
from recipe.rewards.exact import TooLarge, rational
from recipe.rewards.expressions import MAX_CHARACTERS, MAX_DEPTH, Unreadable, number, read_expression


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
        ("14 1/2", "29/2"),
        (r"36\frac12", "73/2"),
        (r"6(\frac15)", "6/5"),
        (r"0.1\overline{6}", "1/6"),
        ("123_5", "38"),
        (r"\sqrt[3]{-27}", "-3"),
        (r"12\cos 60^\circ", "6"),
        (r"\sin^2 1+\cos^2 1", "1"),
        (r"\log_9 27", "3/2"),
        (r"\gcd(12,18)\max(2,5)", "30"),
        (r"\lfloor 100\pi\rfloor", "314"),
        (r"\lfloor(2+\sqrt3)^{10}\rfloor", "524173"),
        (r"(1+\sqrt2)^2+(1-\sqrt2)^2", "6"),
        (r"\frac{25\pi}{\pi}", "25"),
        (r"e^{i\pi}", "-1"),
        (r"\frac{x}{x+1}", r"1-\frac{1}{x+1}"),
    ],
)
def test_values_are_exact(text: str, value: str) -> None:
    assert same(read_expression(text), read_expression(value))


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
            "5,5",
            "5=5",
            "5\\",
            "5²",
        ),
        *(
            "٢٥",
            r"\frac{25}{}",
            r"\frac{1}",
            r"\sqrt",
            r"\foo{5}",
            r"36\frac32",
            r"5\,5",
            r"5\{2\}",
            r"\sin",
            r"\sqrt12",
        ),
        *(r"\log 1000/10", r"\log 1000 \cdot 5", r"\log_2 8 \div 3", r"\log 1000*5", r"\log 10(5)", r"\log 10\log 10"),
        *(r"\log{1000}/10", r"{\log 1000}/10", r"\log|1000|/10", r"\log[1000]/10", r"\log 0.1/5", r"\log\log 10/5"),
        *(r"\log+1000", r"\log(10)^2", r"\log(3)!", r"\log 10 \choose 2"),
        *("8/2(4)", r"50\div2(1)", "1/2{50}", "2^3^2", "2^{3}!", "3!!", "{3!}!", "5!^2", r"5\cdot{2+3}", "{1+2}^2"),
        r"5 \choose 2 \choose 1",
        "1+" * (MAX_CHARACTERS // 2) + "11",
    ],
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(Unreadable):
        read_expression(text)


def test_nothing_is_read_too_deep() -> None:
    with pytest.raises(Unreadable):
        read_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)


@pytest.mark.parametrize("text", ["9^{9^{9}}", "(10^{100})!", r"\binom{10^9}{10^8}", "2^{99999999}-2^{99999999}"])
def test_large_numbers_are_not_computed(text: str) -> None:
    with pytest.raises(TooLarge):
        rational(read_expression(text))


@pytest.mark.parametrize("text", [r"\frac10", "0^0", "0^{-1}", r"\log 0", "(-3)!", r"\sqrt2", "x", r"2^{.9999999999}"])
def test_what_has_no_rational_value(text: str) -> None:
    assert rational(read_expression(text)) is None


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0", "2^{-40}"),
        (r"\frac{22}{7}", r"\pi"),
        (r"\sqrt2", "1.4142135623730951"),
        ("0^0", "1"),
        (r"\frac10", r"\frac10+1"),
    ],
)
def test_nearly_is_not_equal(left: str, right: str) -> None:
    assert not same(read_expression(left), read_expression(right))


def test_a_rational_number_is_one_to_sympy() -> None:
    assert as_sympy(number(3)) == 3
