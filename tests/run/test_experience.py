"""What the trainer is told of where a token is from."""

from dataclasses import replace

import pytest
from made_up import step_metrics

from recipe.config import Config
from recipe.data.prompts import Prompt
from recipe.experience import with_advantages
from recipe.messages import OLDER_TOKENS
from recipe.rewards import Grade
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import GenerationMetrics, Rollout
from recipe.rollout.sample import SampleGroup

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
    group = SampleGroup.of(Prompt(0, (), "", (1, 2), "0"), 0, 2)
    for number, sample in enumerate(group.samples):
        sample.append([7] * len(versions), [-1.0] * len(versions), versions)
        sample.engine = engine
        sample.grade = Grade(float(number), GradeStatus.GRADED, None, "")
    rollout = Rollout([group], "4", GenerationMetrics.of([group], "4", 1.0, ClientCounters()))
    assert [sample.sources.tolist() for sample in with_advantages(rollout, CONFIG)] == [sources] * 2
    assert rollout.metrics.stale_share == versions.count("3") / len(versions)


def test_a_metrics_line_has_the_acceptance_of_drafts_by_depth_where_there_are_drafts() -> None:
    plain = step_metrics(1)
    assert plain.rollout is not None
    assert not [name for name in plain.as_line() if "draft" in name]
    drafting = replace(plain.rollout, draft_accept_length=1.9, draft_accept_rates=(0.6, 0.3))
    line = replace(plain, rollout=drafting).as_line()
    found = {name: value for name, value in line.items() if "draft" in name}
    assert found == {"draft_accept_length": 1.9, "draft_accept_rate_1": 0.6, "draft_accept_rate_2": 0.3}
