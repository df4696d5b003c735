"""Rewards: what a response answers, and whether that equals the label."""

from recipe.rewards.functions import REWARD_RULES, CustomReward, Reward, RewardRule, RewardType, load_custom_reward
from recipe.rewards.grader import Grade, Grader, GradeRequest, GradeStatus

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
    "load_custom_reward",
]
