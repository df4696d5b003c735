"""Evaluation between training steps gives what `evaluation.aime` gives."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_support import MAX_TOKENS, N_SAMPLES, KnownServer, evaluate, write_questions

from evaluation.grading import Judge, Response, Verdict
from evaluation.in_loop import evaluate as evaluate_in_loop
from evaluation.in_loop import open_judge, read_sets
from evaluation.problems import INSTRUCTION, ProblemFile, read_problems
from recipe.config import resolve
from recipe.config.loading import RECIPES
from recipe.data.prompts import Prompt
from recipe.messages import Evaluated
from recipe.rollout.client import RolloutClient
from recipe.run.metrics import StepMetrics
from recipe.run.phases import StepSeconds
from recipe.run.plots import draw_rewards
from recipe.sampling.sample import SampleGroup
from recipe.system.errors import UserError


def in_loop_words(checkpoint: Path, data: Path, recipe: Path | str = "tiny") -> list[str]:
    flags = (
        f"--recipe {recipe} --hf-checkpoint {checkpoint} --prompt-data {data} --eval-prompt-data {data.stem} {data} "
        f"--n-samples-per-eval-prompt {N_SAMPLES} --eval-max-response-len {MAX_TOKENS} --eval-temperature 1"
    )
    return flags.split()


def sets_of(checkpoint: Path, data: Path, *more: str, recipe: Path | str = "tiny") -> list[Prompt]:
    """What training reads of the file, in a context that is long enough."""
    config_file = checkpoint / "config.json"
    architecture = json.loads(config_file.read_text()) | {"max_position_embeddings": 4096}
    longer = data.parent / "longer"
    if not longer.exists():
        shutil.copytree(checkpoint, longer)
        (longer / "config.json").write_text(json.dumps(architecture))
    return read_sets(resolve([*in_loop_words(longer, data, recipe), *more]))[data.stem]


async def in_loop(server: KnownServer, data: Path, grader: object) -> Evaluated:
    resolved = resolve(in_loop_words(server.checkpoint, data))
    async with RolloutClient([server.url]) as client:
        found = await evaluate_in_loop(client, grader, read_sets(resolved), resolved.config, expected_version="1")
    return found[data.stem]


async def test_it_is_the_same_evaluation(server: KnownServer, data: Path, tmp_path: Path) -> None:
    import asyncio

    result = await asyncio.to_thread(evaluate, "--url", server.url, "--data", data, "--save", tmp_path / "out")
    server.asked.clear()
    with Judge() as judge:
        found = await in_loop(server, data, judge)
    assert set(server.asked) == {sample.seed for problem in result.problems for sample in problem.samples}
    score = result.score
    metrics = found.values
    assert found.scores == tuple(problem.correct_share for problem in result.problems)
    assert found.samples_per_problem == N_SAMPLES
    assert (metrics["reward"], metrics["ci95_low"], metrics["ci95_high"]) == (score.avg_at_n.mean, *score.avg_at_n.ci95)
    assert metrics["samples"] == score.samples
    assert metrics["response_length"] == score.tokens.mean
    assert metrics["truncated_share"] == score.truncated_share > 0
    assert metrics["no_answer_share"] == score.no_answer_share > 0
    assert metrics["grader_failed_share"] == 0
    assert metrics["pass_at_n"] == score.pass_at[N_SAMPLES].mean
    assert metrics["maj_at_n"] == score.maj_at[N_SAMPLES].mean


async def test_a_custom_reward_is_averaged(server: KnownServer, data: Path) -> None:
    from recipe.rewards import CustomReward, Grader
    from recipe.sampling.sample import grade_group

    with Grader(CustomReward("custom_rewards:by_label")) as grader:

        async def grade(group: SampleGroup) -> None:
            await grade_group(grader, group)

        found = await in_loop(server, data, grade)
    metrics = found.values
    assert metrics["reward"] == pytest.approx(3.0)
    assert sum(found.scores) / len(found.scores) == pytest.approx(3.0)
    assert metrics["ci95_low"] < 3 < metrics["ci95_high"]
    assert "pass_at_n" not in metrics


def test_training_asks_as_the_command_does(checkpoint: Path, data: Path) -> None:
    default = sets_of(checkpoint, data, "--eval-instruction", INSTRUCTION)
    assert default == read_problems(ProblemFile(data), data.parent / "longer", max_tokens=4000)
    bare = sets_of(checkpoint, data)  # the tiny recipe says so
    assert bare == read_problems(ProblemFile(data, instruction=""), data.parent / "longer", max_tokens=4000)
    assert default != bare


def test_who_is_asked_for_a_box(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "asks.toml"
    recipe.write_text((RECIPES / "tiny.toml").read_text().replace('eval_instruction = ""', ""))
    for more, asked in (([], True), (["--rm-type", "dapo"], False), (["--custom-rm-path", "math:hypot"], False)):
        problems = sets_of(checkpoint, data, *more, recipe=recipe)
        assert all((INSTRUCTION in problem.text) is asked for problem in problems)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([{"prompt": "1+1=", "label": "1/2"}], "is no integer"),
        ([{"prompt": "1+1=", "label": "1000"}], "is not between 0 and 999"),
        ([{"prompt": "1+1=", "label": "2"}] * 2, "lines 1 and 2 ask the same"),
        ([{"id": 1, "prompt": "1+1=", "label": "2"}, {"id": 1, "prompt": "1+2=", "label": "3"}], "have the same 'id'"),
    ],
)
def test_training_checks_as_the_command_does(
    checkpoint: Path, tmp_path: Path, lines: list[dict[str, str]], problem: str
) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=problem):
        sets_of(checkpoint, data)


def test_files_of_another_form(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "math.jsonl"
    data.write_text(json.dumps({"problem": "1/2+0=", "answer": "\\frac{1}{2}"}) + "\n")
    words = ["--eval-input-key", "problem", "--eval-label-key", "answer"]
    [prompt] = sets_of(checkpoint, data, *words, "--eval-labels", "any")
    assert (prompt.label, prompt.name) == ("\\frac{1}{2}", "1")
    with pytest.raises(UserError, match="is no integer"):
        sets_of(checkpoint, data, *words)


def test_answers_are_looked_for_where_the_reward_taught_to_put_them(checkpoint: Path, data: Path) -> None:
    words = in_loop_words(checkpoint, data)
    said = [
        Response("so</think>Answer: 25", "25"),
        Response(r"so</think>\boxed{25}", "25"),
        Response("Answer: 25", "25", prompt="<think>"),
    ]
    for more, verdicts in (
        ([], [Verdict.NO_ANSWER, Verdict.CORRECT, Verdict.NO_ANSWER]),
        (["--rm-type", "dapo"], [Verdict.CORRECT, Verdict.CORRECT, Verdict.NO_ANSWER]),
    ):
        with open_judge(resolve([*words, *more]).config) as judge:
            assert [judgement.verdict for judgement in judge.judge(said)] == verdicts


async def test_one_problem_with_a_custom_reward_has_no_interval_and_can_be_drawn(
    server: KnownServer, tmp_path: Path
) -> None:
    from recipe.rewards import CustomReward, Grader
    from recipe.sampling.sample import grade_group

    data = write_questions(tmp_path / "one.jsonl", {"a": ("1+2=", 3)})
    with Grader(CustomReward("custom_rewards:always")) as grader:

        async def grade(group: SampleGroup) -> None:
            await grade_group(grader, group)

        metrics = (await in_loop(server, data, grade)).values
    line = StepMetrics(step=1, evals={"one": metrics}, seconds=StepSeconds(1.0, {})).as_line()
    assert (line["eval/one"], line["eval/one_ci95_low"], line["eval/one_ci95_high"]) == (2.5, None, None)
    others = [line | {"step": 2, "eval/one_ci95_low": 2.0, "eval/one_ci95_high": 3.0}]
    assert draw_rewards("one", [line, *others], ["one"]).startswith(b"\x89PNG")
