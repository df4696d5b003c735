"""Rewards: what a response answers, and whether that equals the label."""

from recipe.rewards.functions import REWARD_RULES, CustomReward, Reward, RewardRule, RewardType
from recipe.rewards.grader import Grade, Grader, GradeRequest, GradeStatus, check_custom_reward

__all__ = [
    "REWARD_RULES",
    "CustomReward",
    "Grade",
    "GradeRequest",
    "GradeStatus",
    "Grader",
    "Reward",
    "RewardRule",
    "RewardType",
    "check_custom_reward",
]
