"""What tools and templates say between the model's turns is in the sequence, and nowhere where it would mislead."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipe.config import Config
from recipe.config.groups_training import GrpoConfig
from recipe.data.prompts import Prompt
from recipe.experience import rollout_metrics, sample_records, shown_tokens, with_advantages, with_log_probs
from recipe.messages import OLDER_TOKENS, Scores
from recipe.rewards import Grade
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import GenerationMetrics, Rollout, check_versions
from recipe.rollout.pending import PendingGroup
from recipe.run.kept_steps import NO_VERSION, kept_step, read_step, write_step
from recipe.run.shown_tokens import read_tokens, write_tokens
from recipe.sampling.sample import NO_WEIGHTS, FinishReason, SampleGroup

CONFIG = Config.model_validate(
    {
        "model": {"hf_checkpoint": "hf"},
        "data": {"prompt_data": "prompts"},
        "rollout": {"num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 8},
        "optimizer": {"lr": 1e-3},
    }
)
PROMPT = Prompt(0, (), "", (1, 2), "0")
SPOKEN = [True, True, False, False, True]


def two_turns() -> SampleGroup:
    """Two samples that say 7 7, read 8 8 from a tool, and say 9; the first turn is of older weights."""
    group = SampleGroup.of(PROMPT, 0, 2)
    for number, sample in enumerate(group.samples):
        sample.append_model([7, 7], [-1.0, -1.0], ["3", "3"])
        sample.append_environment([8, 8])
        sample.append_model([9], [-4.0], ["4"])
        sample.engine, sample.finish_reason = 1, FinishReason.STOP
        sample.grade = Grade(float(number), GradeStatus.GRADED, None, "")
    return group


@pytest.fixture
def rollout() -> Rollout:
    group = two_turns()
    return Rollout([group], "4", GenerationMetrics.of([group], "4", 2.0, ClientCounters()))


def test_lengths_speeds_and_log_probs_are_of_what_the_model_said(rollout: Rollout) -> None:
    values = rollout_metrics(4, rollout, ClientCounters())
    assert values["response_length"] == values["response_length_p10"] == values["response_length_p90"] == 3
    assert values["rollout_tokens_per_second"] == 1.0
    assert values["stale_token_share"] == pytest.approx(2 / 3)
    [record, _] = sample_records(rollout, CONFIG)
    assert (record.response_length, record.environment_length) == (3, 2)
    assert record.weight_versions == [3, 4]
    assert record.mean_log_prob == -2.0


def test_the_trainer_gets_the_whole_sequence_and_learns_from_what_the_model_said(rollout: Rollout) -> None:
    check_versions(rollout.groups[0], "4", [2, 2])
    [sample, _] = with_advantages(rollout, CONFIG)
    assert sample.tokens.tolist() == [1, 2, 7, 7, 8, 8, 9]
    assert sample.loss_mask.tolist() == SPOKEN
    assert sample.sources is not None
    assert sample.sources[SPOKEN].tolist() == [OLDER_TOKENS, OLDER_TOKENS, 2]


def test_no_token_answers_for_what_the_environment_said(rollout: Rollout) -> None:
    """A KL in the reward, as REINFORCE++ has it, is summed up over the tokens that follow."""
    samples = with_advantages(rollout, CONFIG)
    reference = Scores({sample.index: np.zeros(5, dtype=np.float32) for sample in samples})
    grpo = GrpoConfig(advantage_estimator="reinforce_plus_plus", kl_coef=0.5)
    found = []
    for of_environment in (0.0, 100.0):
        log_probs = np.array([-1, -2, of_environment, of_environment, -3], dtype=np.float32)
        old = Scores({sample.index: log_probs for sample in samples})
        found.append([sample.advantages[SPOKEN].tolist() for sample in with_log_probs(samples, old, reference, grpo)])
    assert found[0] == found[1]


def test_the_run_directory_tells_them_apart(rollout: Rollout, tmp_path: Path) -> None:
    samples = with_advantages(rollout, CONFIG)
    write_tokens(tmp_path, 4, shown_tokens(rollout, samples, {}, lambda ids: " ".join(map(str, ids))))
    shown = read_tokens(tmp_path, 4, 0)
    assert shown is not None
    assert shown.pieces == ["7", "7", "8", "8", "9"]
    assert shown.log_probs == [-1.0, -1.0, None, None, -4.0]
    versions = [sample.weight_versions for sample in rollout.groups[0].samples]
    write_step(tmp_path, 5, kept_step(samples, versions), newest=1)
    kept = read_step(tmp_path, 5)
    assert [made.tolist() for made in kept.versions] == [[3, 3, NO_VERSION, NO_VERSION, 4]] * 2
    assert kept.samples[0].loss_mask.tolist() == SPOKEN


def test_a_checkpoint_of_a_sample_under_way_keeps_them() -> None:
    group = two_turns()
    again = PendingGroup.from_json(json.loads(json.dumps(PendingGroup(group, (1, 2)).as_json())), lambda _: PROMPT)
    for before, after in zip(group.samples, again.group.samples, strict=True):
        assert after.weight_versions == before.weight_versions == ["3", "3", NO_WEIGHTS, NO_WEIGHTS, "4"]
        assert after.loss_mask == before.loss_mask
        assert after.rollout_log_probs == before.rollout_log_probs
