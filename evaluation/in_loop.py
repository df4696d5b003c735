"""Evaluation of the weights that the engines hold, between training steps."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Self

from evaluation.grading import Judge, Judgement, Response, Verdict, aime_label_problem
from evaluation.problems import INSTRUCTION, LabelProblem, ProblemFile, read_problems
from evaluation.scoring import Judged, score
from recipe.config import Config, Resolved
from recipe.data.prompts import Prompt
from recipe.messages import Evaluated
from recipe.rewards import REWARD_RULES, RewardType
from recipe.rewards.extract import answer_after_thinking, answer_line_after_thinking
from recipe.rollout.client import RolloutClient
from recipe.rollout.generate import OnGroup, Rollout, SeedStream, generate_rollout
from recipe.run.metrics import Values
from recipe.run.statistics import clustered_mean
from recipe.sampling.sample import SampleGroup
from recipe.sampling.sampling_params import SamplingParams


def read_sets(resolved: Resolved) -> dict[str, list[Prompt]]:
    """The problems of each evaluation set, by its name, with the checks and the instruction of `evaluation.aime` where
    the configuration says nothing else. Raises UserError for what is wrong in them."""
    config = resolved.config
    return {
        data.name: read_problems(
            ProblemFile(
                data.path,
                config.eval.eval_input_key or config.data.input_key,
                config.eval.eval_label_key or config.data.label_key,
                instruction=_instruction(config),
                apply_chat_template=config.data.apply_chat_template,
                template_kwargs=config.data.apply_chat_template_kwargs,
                label_problem=_label_problem(config),
            ),
            config.model.hf_checkpoint,
            max_tokens=resolved.max_eval_prompt_len,
        )
        for data in config.eval.eval_prompt_data
    }


def _label_problem(config: Config) -> LabelProblem | None:
    rollout = config.rollout
    if rollout.custom_rm_path is not None or rollout.rm_type is None:
        return None
    if config.eval.eval_labels == "aime":
        return aime_label_problem
    return REWARD_RULES[RewardType(rollout.rm_type)].label_problem


def _instruction(config: Config) -> str:
    if config.eval.eval_instruction is not None:
        return config.eval.eval_instruction
    asks_for_a_box = _is_judged(config) and not _answers_in_lines(config)
    return INSTRUCTION if asks_for_a_box else ""


def _is_judged(config: Config) -> bool:
    """Whether answers are right or wrong by a named rule; else a function of the user's says what they are worth."""
    return config.rollout.custom_rm_path is None and config.rollout.rm_type is not None


def _answers_in_lines(config: Config) -> bool:
    return config.rollout.rm_type == RewardType.DAPO


def open_judge(config: Config) -> Judge:
    """The judge of evaluations: of boxes after the thinking part, or of the answers that `--rm-type dapo` teaches."""
    extract = answer_line_after_thinking if _answers_in_lines(config) else answer_after_thinking
    return Judge(extract, timeout_s=config.rollout.rm_timeout_s, num_workers=config.rollout.rm_num_workers)


class InLoopEvaluation:
    """The evaluation sets of a run, with what judges the answers to them. Raises UserError for what is wrong in them.

    A function of the user's says by itself what is good; else a judge does, which lives as long as the context.
    """

    def __init__(self, resolved: Resolved) -> None:
        self._config = resolved.config
        self._sets = read_sets(resolved)
        self._judge = open_judge(self._config) if _is_judged(self._config) else None

    def __enter__(self) -> Self:
        if self._judge is not None:
            self._judge.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._judge is not None:
            self._judge.__exit__(*raised)

    async def evaluate(self, client: RolloutClient, grade: OnGroup, *, expected_version: str) -> dict[str, Evaluated]:
        """The score of the engines' weights on each set, by its name."""
        return await evaluate(client, self._judge or grade, self._sets, self._config, expected_version=expected_version)


async def evaluate(
    client: RolloutClient,
    grader: Judge | OnGroup,
    sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    expected_version: str,
) -> dict[str, Evaluated]:
    """The score on each set of prompts, by its name, from `--n-samples-per-eval-prompt` samples of each prompt.

    With a judge it is the share of right answers, with the verdicts and intervals of `evaluation.aime`; with a custom
    reward function or environment, which leaves its grades in the samples, the mean reward. The same samples' seeds are
    used at every evaluation, so that two of them differ by the weights alone.
    """
    sampling = SamplingParams.for_evaluation(config.eval, config.rollout)
    results = {}
    for name, prompts in sets.items():
        judgements: dict[int, Judgement] = {}

        async def judge(group: SampleGroup, known: dict[int, Judgement] = judgements) -> None:
            assert isinstance(grader, Judge)
            known.update(await judged_group(grader, group))

        rollout = await generate_rollout(
            client,
            prompts,
            n_samples=config.eval.n_samples_per_eval_prompt,
            sampling=sampling,
            seeds=SeedStream(config.misc.seed, ("eval", name)),
            expected_version=expected_version,
            on_group=judge if isinstance(grader, Judge) else grader,
        )
        results[name] = _score(rollout, judgements, config.misc.seed) if judgements else _mean_reward(rollout)
    return results


async def judged_group(judge: Judge, group: SampleGroup) -> dict[int, Judgement]:
    """The judgement of every sample of a complete group, by its index."""
    prompt = group.prompt
    responses = [Response(sample.response, prompt.label, sample.truncated, prompt.text) for sample in group.samples]
    judgements = await judge.judge_async(responses)
    return {sample.index: judgement for sample, judgement in zip(group.samples, judgements, strict=True)}


def _score(rollout: Rollout, judgements: Mapping[int, Judgement], seed: int) -> Evaluated:
    judged = [
        [Judged(judgements[sample.index], sample.generated_length, sample.truncated) for sample in group.samples]
        for group in rollout.groups
    ]
    found = score(judged, seed)
    values = {
        "reward": found.avg_at_n.mean,
        "ci95_low": found.avg_at_n.ci95[0],
        "ci95_high": found.avg_at_n.ci95[1],
        "samples": found.samples,
        "response_length": found.tokens.mean,
        "truncated_share": found.truncated_share,
        "no_answer_share": found.no_answer_share,
        "grader_failed_share": found.grader_failed_share,
        "pass_at_n": found.pass_at[max(found.pass_at)].mean,
        "maj_at_n": found.maj_at[max(found.maj_at)].mean,
    }
    return _evaluated(values, [[float(one.judgement.verdict is Verdict.CORRECT) for one in group] for group in judged])


def _evaluated(values: Values, rewards: Sequence[Sequence[float]]) -> Evaluated:
    """With the mean of each problem's samples."""
    return Evaluated(values, tuple(statistics.fmean(of_problem) for of_problem in rewards), len(rewards[0]))


def _mean_reward(rollout: Rollout) -> Evaluated:
    rewards = [
        [0.0 if sample.reward is None else sample.reward for sample in group.samples] for group in rollout.groups
    ]
    mean = clustered_mean([statistics.fmean(of_prompt) for of_prompt in rewards])
    values = {
        "reward": mean.mean,
        "ci95_low": mean.low,
        "ci95_high": mean.high,
        "samples": rollout.metrics.samples,
        "response_length": rollout.metrics.mean_response_length,
        "truncated_share": rollout.metrics.truncated_share,
    }
    return _evaluated(values, rewards)
