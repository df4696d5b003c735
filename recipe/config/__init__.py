"""Configuration: typed groups, the specification's flags, TOML recipes, and every rule that needs no device."""

from recipe.config.architecture import Architecture
from recipe.config.fields import EvalPromptData
from recipe.config.groups_rollout import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    MiscConfig,
    RolloutConfig,
    SglangConfig,
)
from recipe.config.groups_training import (
    CheckpointConfig,
    GrpoConfig,
    ModelConfig,
    MtpConfig,
    OptimizerConfig,
    PerfConfig,
)
from recipe.config.resolved import Resolved, resolve
from recipe.config.schema import Config
from recipe.config.usage import help_text

__all__ = [
    "Architecture",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "EvalPromptData",
    "GrpoConfig",
    "MiscConfig",
    "ModelConfig",
    "MtpConfig",
    "OptimizerConfig",
    "PerfConfig",
    "Resolved",
    "RolloutConfig",
    "SglangConfig",
    "help_text",
    "resolve",
]
