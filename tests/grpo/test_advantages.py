import math
import statistics

import numpy as np
import pytest

from recipe.grpo.advantages import group_advantages, penalise_kl
from recipe.system.errors import UserError


def test_is_the_standard_score_with_the_sample_deviation():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    expected = [(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards]
    assert group_advantages(rewards) == pytest.approx(expected, rel=1e-5)


def test_one_right_answer_among_eight_by_hand():
    # mean 1/8, sample variance (7/64 * 1/8 ... ) = 1/8
    assert group_advantages([1.0] + [0.0] * 7)[0] == pytest.approx((7 / 8) / math.sqrt(1 / 8), rel=1e-5)


@pytest.mark.parametrize("std_normalization", [True, False])
def test_advantages_of_a_group_add_up_to_nothing(std_normalization):
    assert sum(group_advantages([0.3, -1.0, 2.0], std_normalization=std_normalization)) == pytest.approx(0, abs=1e-9)


def test_without_normalisation_only_the_mean_is_taken_off():
    assert group_advantages([3.0, 1.0], std_normalization=False) == [1.0, -1.0]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3])
@pytest.mark.parametrize("std_normalization", [True, False])
def test_equal_rewards_teach_exactly_nothing(reward, std_normalization):
    assert group_advantages([reward] * 3, std_normalization=std_normalization) == [0.0, 0.0, 0.0]


def test_the_scale_of_rewards_does_not_matter_when_normalised():
    rewards = [1.0, 0.0, 4.0]
    assert group_advantages([1000 * r - 7 for r in rewards]) == pytest.approx(group_advantages(rewards), rel=1e-4)


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_without_a_baseline_is_refused_with_the_flag_to_change(rewards):
    with pytest.raises(UserError, match="--n-samples-per-prompt"):
        group_advantages(rewards)


def test_kl_in_reward_lowers_what_the_policy_has_come_to_prefer():
    advantages, policy, reference = np.float32([[1, 1, 1], [-1, -2, -3], [-1, -1, -4]])
    penalised = penalise_kl(advantages, policy, reference, 0.1)
    np.testing.assert_allclose(penalised, [1.0, 1.1, 0.9], rtol=1e-6)
    assert penalised.dtype == np.float32
