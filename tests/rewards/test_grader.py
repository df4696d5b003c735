import asyncio
import threading
import time

import pytest

from recipe.rewards import (
    REWARD_RULES,
    CustomReward,
    Grade,
    Grader,
    GradeRequest,
    GradeStatus,
    RewardType,
    check_custom_reward,
    workers,
)
from recipe.system.errors import UserError

DEEPSCALER, MATH, DAPO = (REWARD_RULES[kind] for kind in RewardType)


@pytest.fixture(scope="module")
def grader():
    with Grader(DEEPSCALER, timeout_s=60) as grader:
        yield grader


def boxed(answer, label="12", **more):
    return GradeRequest("?", f"</think>\\boxed{{{answer}}}", label, **more)


def reward(rule, response, label):
    with Grader(rule) as grader:
        return grader.grade([GradeRequest("?", response, label)])[0].reward


async def test_a_response_is_graded_by_the_rule_that_its_request_names():
    response = "</think>It is so.\n\nAnswer: $\\sqrt{2}\\sqrt{72}$"
    requests = [
        GradeRequest("?", response, label, rm_type=rm_type)
        for label in ("12", "13")
        for rm_type in (None, RewardType.DAPO, RewardType.MATH)
    ]
    with Grader(DEEPSCALER, timeout_s=60) as grader:
        found = grader.grade(requests)
        assert await grader.grade_async(requests) == found
    assert [grade.reward for grade in found] == [0.0, 1.0, 0.0, 0.0, -1.0, 0.0]
    assert [grade.status for grade in found[:2]] == [GradeStatus.NO_ANSWER, GradeStatus.GRADED]
    with Grader(DAPO, timeout_s=60) as grader:
        assert [grade.reward for grade in grader.grade(requests[:2])] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("12", "12", 1.0),
        ("13", "12", 0.0),
        ("012", "12", 1.0),
        ("12", r"\boxed{12}", 1.0),
        ("204.0", "204", 1.0),
        (r"\frac{24}{2}", "12", 1.0),
        (r"\text{12}", "12", 1.0),
        (r"12^\circ", "12", 1.0),
        (r"12 \text{ cm}", "12", 1.0),
        (r"\frac{1}{3}", r"\dfrac13", 1.0),
        ("x=12", "12", 1.0),
        ("12,13", "12", 0.0),
        ("hello", "12", 0.0),
        (r"\sqrt{2}", "1.4", 0.0),
        (r"\sqrt{2}", "1.41421356", 0.0),
    ],
)
def test_equal_answers(grader, answer, label, expected):
    (grade,) = grader.grade([boxed(answer, label)])
    assert (grade.reward, grade.status, grade.answer) == (expected, GradeStatus.GRADED, answer)


@pytest.mark.parametrize(
    ("response", "deepscaler", "math", "dapo"),
    [
        (r"</think>\boxed{12}", 1, 1, 1),
        (r"\boxed{12}", 0, 1, 1),
        (r"</think>\boxed{13}", 0, 0, -1),
        ("Answer: 12", 0, 0, 1),
        ("</think>12", 0, 0, -1),
        (r"<think>\boxed{12}", 0, 0, -1),
        (r"\boxed{12}</think>13", 0, 0, -1),
    ],
)
def test_what_each_reward_function_gives(response, deepscaler, math, dapo):
    assert [reward(rule, response, "12") for rule in (DEEPSCALER, MATH, DAPO)] == [deepscaler, math, dapo]


def test_a_response_without_answer_says_why(grader):
    assert grader.grade(
        [
            GradeRequest("?", r"\boxed{12}", "12"),
            GradeRequest("?", r"\boxed{12}", "12", truncated=True),
            GradeRequest("?", r"</think>\boxed{12} \boxed{", "12"),
            boxed("12", truncated=True),
        ]
    ) == [
        Grade(0.0, GradeStatus.NO_ANSWER, None, "no </think>"),
        Grade(0.0, GradeStatus.TRUNCATED, None, "no </think>"),
        Grade(0.0, GradeStatus.NO_ANSWER, None, "the last \\boxed{ is never closed"),
        Grade(1.0, GradeStatus.GRADED, "12", "", "12"),
    ]


def test_a_batch_of_integers_is_graded_in_ten_milliseconds_without_a_process(monkeypatch):
    monkeypatch.delattr("recipe.rewards.workers.Worker")
    requests = [boxed(str(i % 20)) for i in range(256)]
    seconds = []
    with Grader(DEEPSCALER) as grader:
        for _ in range(15):
            started = time.thread_time()
            assert sum(grade.reward for grade in grader.grade(requests)) == 13
            seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.01


HANG = "e^{e^{e^{e^{e}}}}"


def test_a_hang_is_worth_a_wrong_answer_within_its_time_and_is_remembered(monkeypatch):
    sides = "=".join([HANG, *(rf"\sqrt{{{number}}}" for number in range(2, 18))])
    with Grader(DAPO, timeout_s=1, num_workers=1) as grader:
        hostile, good = grader.grade([GradeRequest("?", f"Answer: {text}", "12") for text in (sides, r"\sqrt{144}")])
        assert hostile == Grade(-1.0, GradeStatus.GRADER_FAILED, sides, "no result within 1 s", sides)
        assert good.reward == 1
        assert grader.collect_counts()[GradeStatus.GRADER_FAILED] == 1
        assert sum(grader.collect_counts().values()) == 0
        monkeypatch.setattr(grader._pool, "submit", None)
        assert grader.grade([GradeRequest("?", f"Answer: {sides}", "12")]) == [hostile]


def test_a_number_of_too_many_bits_is_wrong_at_once(monkeypatch):
    monkeypatch.delattr("recipe.rewards.workers.Worker")
    with Grader(DAPO) as grader:
        (grade,) = grader.grade([GradeRequest("?", "Answer: 7^{7^{7^{7}}}", "12")])
    assert (grade.reward, grade.status) == (-1.0, GradeStatus.GRADED)


def test_equal_questions_are_asked_once(grader, monkeypatch):
    asked = []
    submit = grader._pool.submit
    monkeypatch.setattr(grader._pool, "submit", lambda *pair: asked.append(pair) or submit(*pair))
    for _ in range(2):
        assert [grade.reward for grade in grader.grade([boxed(r"\sqrt6\sqrt{24}")] * 8)] == [1.0] * 8
    assert len(asked) == 1


async def test_grades_from_an_event_loop_without_blocking_it(grader):
    requests = [boxed("12"), boxed(r"\sqrt{2}\sqrt{72}"), boxed(r"\sqrt{2}\sqrt{73}"), boxed("13")]
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    grades = await asyncio.gather(*(grader.grade_async(requests) for _ in range(4)))
    ticking.cancel()
    assert [[grade.reward for grade in group] for group in grades] == [[1.0, 1.0, 0.0, 0.0]] * 4
    assert ticks > 0


def test_grades_off_the_main_thread(grader):
    grades = []
    thread = threading.Thread(target=lambda: grades.extend(grader.grade([boxed(r"\sqrt{3}\sqrt{48}")])))
    thread.start()
    thread.join()
    assert grades[0].reward == 1


HALF_OR_FAIL = CustomReward("functions_for_workers:half_or_fail")


async def test_a_custom_function_is_called_and_its_failures_are_counted():
    expected = {
        "good": Grade(0.5, GradeStatus.GRADED, None, ""),
        "numpy": Grade(0.5, GradeStatus.GRADED, None, ""),
        "torch": Grade(0.5, GradeStatus.GRADED, None, ""),
        "bad": Grade(0.0, GradeStatus.GRADER_FAILED, None, "KeyError: 'a'"),
        "nan": Grade(0.0, GradeStatus.GRADER_FAILED, None, "the reward is nan"),
        "leave": Grade(0.0, GradeStatus.GRADER_FAILED, None, "SystemExit: 3"),
        "die": Grade(0.0, GradeStatus.GRADER_FAILED, None, "the grading process died with status 4"),
    }
    with Grader(HALF_OR_FAIL) as grader:
        requests = [GradeRequest("q", response, "a") for response in expected]
        assert await grader.grade_async(requests) == grader.grade(requests) == list(expected.values())
        counts = grader.collect_counts()
        assert (counts[GradeStatus.GRADED], counts[GradeStatus.GRADER_FAILED]) == (6, 8)
        [none] = grader.grade([GradeRequest("q", "nothing", "a")])
        assert none.reason.startswith("TypeError: float() argument must be")


def test_a_custom_function_that_hangs_is_ended_in_time():
    with Grader(HALF_OR_FAIL, timeout_s=1, num_workers=1) as grader:
        hung, good = grader.grade([GradeRequest("q", "hang", "a"), GradeRequest("q", "good", "a")])
    assert (hung.status, hung.reason) == (GradeStatus.GRADER_FAILED, "no result within 1 s")
    assert good.reward == 0.5


def test_a_custom_function_may_be_a_coroutine():
    with Grader(CustomReward("functions_for_workers:later"), timeout_s=60, num_workers=1) as grader:
        assert [grade.reward for grade in grader.grade([GradeRequest("q", "0.01", "abc")] * 2)] == [3.0, 3.0]


def test_a_reward_function_that_always_raises_stops_the_run():
    with Grader(HALF_OR_FAIL) as grader:
        grader.grade([GradeRequest("q", "bad", "a")] * 3)
        with pytest.raises(UserError, match="none of 3 responses could be graded, the last one: KeyError: 'a'"):
            grader.collect_counts()
        assert sum(grader.collect_counts().values()) == 0


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("os.path", "--custom-rm-path os.path is not of the form module:function"),
        ("no_such_module:f", "--custom-rm-path no_such_module:f: the module cannot be imported"),
        ("os.path:no_such_function", "os.path has no function no_such_function"),
        ("os:sep", "os has no function sep"),
        ("leaves_at_its_import:f", "the process that imports it ends"),
    ],
)
def test_a_custom_function_that_is_not_there_is_a_clear_error(path, problem, tmp_path, monkeypatch):
    (tmp_path / "leaves_at_its_import.py").write_text("import os; os._exit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=problem):
        check_custom_reward(path)


def test_a_custom_function_whose_module_is_never_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "sleeps_at_its_import.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match=r"^--custom-rm-path sleeps_at_its_import:f: not imported within 0\.5 s$"):
        check_custom_reward("sleeps_at_its_import:f")


def test_a_box_inside_thinking_that_the_prompt_opened_is_no_answer():
    for rule in (MATH, DAPO):
        with Grader(rule) as grader:
            (grade,) = grader.grade([GradeRequest("?<think>", r"so \boxed{12}", "12")])
        assert (grade.reward, grade.status) == (rule.wrong, GradeStatus.NO_ANSWER)


def test_of_several_boxes_in_a_label_all_count():
    label = r"\boxed{2} and \boxed{3}"
    assert [reward(MATH, rf"\boxed{{{answer}}}", label) for answer in ("3", "3, 2", r"2 \text{ or } 3")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "label", "good"),
    [
        (RewardType.DEEPSCALER, "12", True),
        (RewardType.DEEPSCALER, r"\frac{1}{2}", True),
        (RewardType.DEEPSCALER, "", False),
        (RewardType.MATH, "?", False),
        (RewardType.DAPO, "1,000", True),
        (RewardType.DAPO, "1/2", False),
        (RewardType.DAPO, r"30^\circ", True),
        (RewardType.MATH, "nan", False),
        (RewardType.MATH, "-Infinity", False),
        (RewardType.MATH, "9" * 5000, False),
        (RewardType.MATH, "5\ud800", False),
        (RewardType.MATH, r"1, 2, \ldots, n", False),
        (RewardType.MATH, r"3\text{ m by }4\text{ m}", False),
        (RewardType.MATH, "12 = 13", False),
        (RewardType.MATH, r"\frac{1}{", False),
        (RewardType.MATH, "12 13", False),
        (RewardType.MATH, r"\boxed{2} and \boxed{3}", True),
        (RewardType.MATH, r"\text{no solution}", True),
        (RewardType.MATH, "(B)", True),
    ],
)
def test_labels_are_checked_by_the_reward(kind, label, good):
    assert (REWARD_RULES[kind].label_problem(label) is None) is good


async def test_a_custom_reward_may_see_the_whole_group() -> None:
    reward = CustomReward("functions_for_workers:longest", sees_group=True)
    with Grader(reward, timeout_s=60, num_workers=1) as grader:
        requests = [GradeRequest("q", response, "a") for response in ("one", "three", "two")]
        assert [grade.reward for grade in grader.grade(requests)] == [0.0, 1.0, 0.0]
        assert [grade.reward for grade in await grader.grade_async(requests)] == [0.0, 1.0, 0.0]
        assert [grade.reward for grade in grader.grade(requests[:1])] == [1.0]
        grades = grader.grade([*requests, GradeRequest("q", "drop", "a")])
    assert {grade.status for grade in grades} == {GradeStatus.GRADER_FAILED}
    assert grades[0].reason == "ValueError: 3 rewards for 4 responses"
    assert len(grades) == 4
