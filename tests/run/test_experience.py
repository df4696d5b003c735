"""What the trainer is told of where a token is from."""

from collections.abc import Sequence

import numpy as np
import pytest

from recipe.config import Config
from recipe.config.groups_training import GrpoConfig
from recipe.data.prompts import Prompt
from recipe.experience import rollout_metrics, sample_records, with_advantages
from recipe.messages import OLDER_TOKENS
from recipe.rewards import REWARD_RULES, Grade, Grader, RewardType
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import GenerationMetrics, Rollout
from recipe.run.metrics import Scalar, StepMetrics
from recipe.run.phases import StepSeconds
from recipe.sampling.sample import FinishReason, SampleGroup, grade_group

CONFIG = Config.model_validate(
    {
        "model": {"hf_checkpoint": "hf"},
        "data": {"prompt_data": "prompts"},
        "rollout": {"num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4},
        "optimizer": {"lr": 1e-3},
    }
)


@pytest.mark.parametrize(
    ("versions", "engine", "sources"),
    [
        (["4", "4"], 0, [1, 1]),
        (["3", "4", "4"], 2, [OLDER_TOKENS, 3, 3]),
        (["3", "3"], 1, [OLDER_TOKENS, OLDER_TOKENS]),
        (["3", "3"], None, [OLDER_TOKENS, OLDER_TOKENS]),
    ],
)
def test_older_tokens_and_engines_are_told_apart(versions: list[str], engine: int | None, sources: list[int]) -> None:
    rollout = graded(versions, engine)
    assert [sample.sources.tolist() for sample in with_advantages(rollout, CONFIG)] == [sources] * 2
    assert rollout.metrics.stale_share == versions.count("3") / len(versions)


def test_routing_of_a_checkpoint_is_not_replayed_where_nobody_asks_for_it() -> None:
    rollout = graded(["4", "4"], 0)
    for group in rollout.groups:
        for sample in group.samples:
            sample.routed_experts = np.zeros((sample.length - 1, 1, 1), dtype=np.uint8)
    replaying = CONFIG.model_copy(update={"grpo": GrpoConfig(use_rollout_routing_replay=True)})
    assert all(sample.routed_experts is None for sample in with_advantages(rollout, CONFIG))
    assert all(sample.routed_experts is not None for sample in with_advantages(rollout, replaying))


def graded(versions: list[str], engine: int | None = 0, drafts: Sequence[int] = ()) -> Rollout:
    """Two responses to one prompt, both with these tokens."""
    group = SampleGroup.of(Prompt(0, (), "", (1, 2), "0"), 0, 2)
    for number, sample in enumerate(group.samples):
        sample.append_model([7] * len(versions), [-1.0] * len(versions), versions)
        sample.engine = engine
        sample.accepted_drafts = list(drafts)
        sample.grade = Grade(float(number), GradeStatus.GRADED, None, "")
    return Rollout([group], "4", GenerationMetrics.of([group], "4", 1.0, ClientCounters()))


def test_the_acceptance_of_drafts_is_told_by_depth_where_there_are_drafts() -> None:
    def of_drafts(rollout: Rollout) -> dict[str, Scalar]:
        line = StepMetrics(
            step=5, values=rollout_metrics(4, rollout, ClientCounters()), seconds=StepSeconds(1.0, {})
        ).as_line()
        return {name: value for name, value in line.items() if "draft" in name}

    assert of_drafts(graded(["4"])) == {}
    assert of_drafts(graded(["4"], drafts=[4, 3, 3])) == {
        "draft_accept_length": 1.9,
        "draft_accept_rate_1": 0.6,
        "draft_accept_rate_2": 0.3,
    }


def of_files(*rewards: tuple[str, Sequence[float]]) -> Rollout:
    """A group of each file's name, with these rewards."""
    groups = []
    for number, (source, of_samples) in enumerate(rewards):
        group = SampleGroup.of(Prompt(7, (), "", (1, 2), "0", source=source), number, len(of_samples))
        for sample, reward in zip(group.samples, of_samples, strict=True):
            sample.append_model([7], [-1.0], ["4"])
            sample.finish_reason = FinishReason.STOP
            sample.grade = Grade(reward, GradeStatus.GRADED, None, "")
        groups.append(group)
    return Rollout(groups, "4", GenerationMetrics.of(groups, "4", 1.0, ClientCounters()))


def test_rewards_are_told_of_each_prompt_file_where_there_are_several() -> None:
    def of_sources(rollout: Rollout) -> dict[str, Scalar]:
        values = rollout_metrics(4, rollout, ClientCounters())
        line = StepMetrics(step=5, values=values, seconds=StepSeconds(1.0, {})).as_line()
        return {name: value for name, value in line.items() if name.startswith("source/")}

    several = of_files(("gsm8k", [0, 1]), ("dapo-math", [-1, -1]), ("gsm8k", [1, 1]))
    assert of_sources(several) == {
        "source/gsm8k": 0.75,
        "source/gsm8k_samples": 4,
        "source/gsm8k_zero_std_share": 0.5,
        "source/dapo-math": -1.0,
        "source/dapo-math_samples": 2,
        "source/dapo-math_zero_std_share": 1.0,
    }
    assert of_sources(of_files(("", [0, 1]), ("", [1, 1]))) == {}
    for sample in several.groups[1].samples:
        sample.fail()
    assert of_sources(several).keys() == {"source/gsm8k", "source/gsm8k_samples", "source/gsm8k_zero_std_share"}


def test_records_tell_the_prompt_file() -> None:
    records = sample_records(of_files(("gsm8k", [0, 1]), ("dapo-math", [-1, -1])), CONFIG)
    assert [record.source for record in records] == ["gsm8k", "gsm8k", "dapo-math", "dapo-math"]


async def test_each_group_is_graded_by_the_reward_of_its_prompts_line() -> None:
    found = {}
    with Grader(REWARD_RULES[RewardType.MATH]) as grader:
        for rm_type in ("", "math", "dapo"):
            group = SampleGroup.of(Prompt(0, (), "", (1,), "12", rm_type=rm_type), 0, 2)
            for sample, response in zip(group.samples, (r"\boxed{12}", r"\boxed{13}"), strict=True):
                sample.response = response
            await grade_group(grader, group)
            found[rm_type] = [sample.reward for sample in group.samples]
    assert found == {"": [1.0, 0.0], "math": [1.0, 0.0], "dapo": [1.0, -1.0]}
