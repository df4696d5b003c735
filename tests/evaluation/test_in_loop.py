"""Evaluation between training steps gives what `evaluation.aime` gives."""

from pathlib import Path

import pytest
from evaluation_support import MAX_TOKENS, N_SAMPLES, KnownServer, evaluate

from evaluation.grading import Judge
from evaluation.in_loop import evaluate as evaluate_in_loop
from evaluation.problems import ProblemFile, read_problems
from recipe.config import resolve
from recipe.rollout.client import RolloutClient
from recipe.rollout.sample import SampleGroup
from recipe.run import EvalMetrics


def in_loop_words(checkpoint: Path, data: Path) -> list[str]:
    flags = (
        f"--recipe tiny --hf-checkpoint {checkpoint} --prompt-data {data} --eval-prompt-data {data.stem} {data} "
        f"--n-samples-per-eval-prompt {N_SAMPLES} --eval-max-response-len {MAX_TOKENS} --eval-temperature 1"
    )
    return flags.split()


async def in_loop(server: KnownServer, data: Path, grader: object) -> EvalMetrics:
    config = resolve(in_loop_words(server.checkpoint, data)).config
    problems = read_problems(ProblemFile(data, instruction=""), server.checkpoint, max_tokens=52)
    async with RolloutClient([server.url]) as client:
        metrics = await evaluate_in_loop(client, grader, {data.stem: problems}, config, expected_version="1")
    return metrics[data.stem]


async def test_it_is_the_same_evaluation(server: KnownServer, data: Path, tmp_path: Path) -> None:
    import asyncio

    result = await asyncio.to_thread(evaluate, "--url", server.url, "--data", data, "--save", tmp_path / "out")
    server.asked.clear()
    with Judge() as judge:
        metrics = await in_loop(server, data, judge)
    assert set(server.asked) == {sample.seed for problem in result.problems for sample in problem.samples}
    score = result.score
    assert (metrics.reward, metrics.ci95_low, metrics.ci95_high) == (score.avg_at_n.mean, *score.avg_at_n.ci95)
    assert metrics.samples == score.samples
    assert metrics.response_length == score.tokens.mean
    assert metrics.truncated_share == score.truncated_share > 0
    assert metrics.no_answer_share == score.no_answer_share > 0
    assert metrics.grader_failed_share == 0
    assert metrics.pass_at_n == score.pass_at[N_SAMPLES].mean
    assert metrics.maj_at_n == score.maj_at[N_SAMPLES].mean


async def test_a_custom_reward_is_averaged(server: KnownServer, data: Path) -> None:
    from recipe.rewards import Grader
    from recipe.rollout.grading import grade_group

    with Grader(lambda prompt, response, label: -2.0 if label == "3" else 4.0) as grader:

        async def grade(group: SampleGroup) -> None:
            await grade_group(grader, group)

        metrics = await in_loop(server, data, grade)
    assert metrics.reward == pytest.approx(3.0)
    assert metrics.ci95_low < 3 < metrics.ci95_high
    assert metrics.pass_at_n is None
