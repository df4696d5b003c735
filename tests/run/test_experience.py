"""What the trainer is told of where a token is from."""

from collections.abc import Sequence

import numpy as np
import pytest

from recipe.config import Config
from recipe.config.groups_training import GrpoConfig
from recipe.data.prompts import Prompt
from recipe.experience import rollout_metrics, with_advantages
from recipe.messages import OLDER_TOKENS
from recipe.rewards import Grade
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import GenerationMetrics, Rollout
from recipe.rollout.sample import SampleGroup
from recipe.run.metrics import Scalar, StepMetrics
from recipe.run.phases import StepSeconds

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
