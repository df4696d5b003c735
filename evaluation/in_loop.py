"""Evaluation of the weights that the engines hold, between training steps."""

from collections.abc import Mapping, Sequence

from evaluation.statistics import clustered_mean
from recipe.config import Config
from recipe.data.prompts import Prompt
from recipe.rollout.client import RolloutClient
from recipe.rollout.generate import OnGroup, SeedStream, generate_rollout
from recipe.rollout.sample import SampleGroup
from recipe.rollout.sampling_params import SamplingParams
from recipe.run import EvalMetrics


async def evaluate(
    client: RolloutClient,
    grade: OnGroup,
    sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    *,
    expected_version: str,
) -> dict[str, EvalMetrics]:
    """The mean score on each set of prompts, by its name, from `--n-samples-per-eval-prompt` samples of each prompt.

    The same samples' seeds are used at every evaluation, so that two of them differ by the weights alone.
    """
    sampling = SamplingParams.for_evaluation(config.eval, config.rollout)
    results = {}
    for name, prompts in sets.items():
        rollout = await generate_rollout(
            client,
            prompts,
            n_samples=config.eval.n_samples_per_eval_prompt,
            sampling=sampling,
            seeds=SeedStream(config.misc.seed, ("eval", name)),
            expected_version=expected_version,
            on_group=grade,
        )
        score = clustered_mean([_scores(group) for group in rollout.groups])
        results[name] = EvalMetrics(
            reward=score.mean,
            ci95_low=score.low,
            ci95_high=score.high,
            samples=rollout.metrics.samples,
            response_length=rollout.metrics.mean_response_length,
            truncated_share=rollout.metrics.truncated_share,
        )
    return results


def _scores(group: SampleGroup) -> list[float]:
    return [0.0 if sample.reward is None else sample.reward for sample in group.samples]
