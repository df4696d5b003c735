import time

import pytest

from recipe.rewards.extract import answer_line_after_thinking, boxed_after_thinking, boxed_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{2}", "2"),  # the last one counts
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{{a}b}}c}", r"\text{{a}b}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),  # an escaped brace closes nothing
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$.", "5"),
        (r"is \boxed 5.", "5"),
        (r"\boxed{ 025 }", "025"),
        ("\\boxed{1\n2}", "1\n2"),
    ],
)
def test_finds_the_last_box(text, answer):
    assert boxed_answer(text).answer == answer


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("12", "no \\boxed{}"),
        (r"\boxedtext{12}", "no \\boxed{}"),
        (r"\boxed{12} or rather \boxed{13", "the last \\boxed{ is never closed"),
        (r"\boxed{12} or rather \boxed{", "the last \\boxed{ is never closed"),
        (r"\boxed{12} or rather \boxed{}", "the last \\boxed{} is empty"),
        (r"\boxed{12} or rather \boxed{ }", "the last \\boxed{} is empty"),
        (r"\boxed{12} or rather \boxed", "the last \\boxed{} is empty"),
        ("\\boxed{12\\", "the last \\boxed{ is never closed"),
    ],
)
def test_a_last_box_that_is_no_answer_is_not_replaced_by_an_earlier_one(text, problem):
    extraction = boxed_answer(text)
    assert (extraction.answer, extraction.problem) == (None, problem)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"hmm \boxed{1}</think>so \boxed{2}", "2"),
        (r"hmm \boxed{1}</think>so it is one", None),  # a number inside of the thinking part is no answer
        (r"hmm \boxed{1}", None),  # never stopped thinking
        (r"a</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"a</think>\boxed{1}</think>", None),
        (r"</think>\boxed{12}", "12"),
        (r"</THINK>\boxed{12}", None),
    ],
)
def test_only_what_follows_the_thinking_counts(text, answer):
    assert boxed_after_thinking(text).answer == answer


def test_says_that_the_thinking_never_ended():
    assert boxed_after_thinking(r"\boxed{1}").problem == "no </think>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 34", "34"),
        ("ANSWER : 34\nbye", "34"),
        ("Answer: 1\nAnswer: 34", "34"),
        (r"Answer: $\boxed{34}$", "34"),
        (r"Answer: \boxed{34", r"\boxed{34"),
        (r"so \boxed{34}", "34"),
        (r"\boxed{12} Answer: 34", "34"),
        ("Answer: 34" + 300 * ".", None),
        ("Answer:", None),
        ("**Answer: 34**", "34"),
        ("**Answer:** $34$", "$34$"),
        ("**Answer:**\n\n$$\\boxed{34}$$\n", "34"),
        ("答案\uff1a34", "34"),
        (r"<think>\boxed{34}", None),
        (r"<think>Answer: 1</think>so \boxed{34}", "34"),
        ("34", None),
    ],
)
def test_dapo_reads_the_last_answer_line_or_box_of_the_tail(text, answer):
    assert answer_line_after_thinking(text).answer == answer


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "{", "}", "\\boxed{1}", "\\boxed ", "\\", "</think>", "a", "\N{FULLWIDTH DIGIT ONE}", "\n"]
)
def test_a_megabyte_of_anything_takes_no_time(unit):
    text = unit * (1_000_000 // len(unit))
    started = time.thread_time()
    for extract in (boxed_answer, boxed_after_thinking, answer_line_after_thinking):
        extract(text)
    assert time.thread_time() - started < 2
