import subprocess
import sys
from collections import Counter

import pytest
from config_support import Try
from pydantic import ValidationError

from recipe.config import Config, GrpoConfig, help_text
from recipe.config.flags import all_flags
from recipe.config.schema import GROUPS, fields


@pytest.mark.parametrize(("key", "field"), list(fields()))
def test_every_field_is_documented(key, field) -> None:
    assert field.description, f"{key} has no docstring"
    assert field.description.strip().endswith((".", "`")), f"{key}'s docstring is no sentence"


def test_flags_are_unique() -> None:
    assert [text for text, count in Counter(flag.text for flag in all_flags()).items() if count > 1] == []


def test_help_names_every_flag() -> None:
    text = help_text()

    assert all(flag.text in text for flag in all_flags())
    assert "--rollout-engine sglang|embedded" in text


def test_a_config_survives_json(resolve_8gpu: Try) -> None:
    config = resolve_8gpu("--moe-layer-freq", "[0]*1+[1]*46", "--sglang-cuda-graph-bs", "1", "2.5", "x").config

    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_config_cannot_be_changed(resolve_8gpu: Try) -> None:
    config = resolve_8gpu().config

    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer.lr = 1.0


def test_groups_stand_in_the_documented_order() -> None:
    assert list(GROUPS) == [
        "cluster", "model", "checkpoint", "data", "rollout", "grpo",
        "optimizer", "perf", "eval", "sglang", "mtp", "misc",
    ]  # fmt: skip


def test_configuration_imports_no_torch() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'sglang'} & set(sys.modules)"
    command = f"import sys, recipe.config; sys.exit(str({heavy}) if {heavy} else 0)"

    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


class TestDerived:
    def test_old_log_probs_are_needed_when_the_policy_moves_within_a_rollout(self, resolve_8gpu: Try) -> None:
        assert resolve_8gpu("--global-batch-size", "64").config.steps_per_rollout == 4
        assert resolve_8gpu("--global-batch-size", "64").config.needs_old_log_probs
        assert not resolve_8gpu().config.needs_old_log_probs

    def test_kl_in_the_reward_needs_reference_and_old_log_probs(self, resolve_8gpu: Try) -> None:
        config = resolve_8gpu("--kl-coef", "0.1").config
        assert config.needs_reference
        assert config.needs_old_log_probs

    def test_kl_in_the_loss_needs_the_reference_only(self, resolve_8gpu: Try) -> None:
        config = resolve_8gpu("--kl-loss-coef", "0.1").config
        assert config.needs_reference
        assert not config.needs_old_log_probs

    def test_a_step_takes_the_whole_rollout_unless_told_otherwise(self, resolve_tiny: Try) -> None:
        config = resolve_tiny().config
        assert config.rollout.global_batch_size is None
        assert config.global_batch_size == config.samples_per_rollout == 256

    def test_engines(self, resolve_8gpu: Try, resolve_tiny: Try) -> None:
        assert resolve_tiny().config.num_engines == 2
        assert resolve_tiny("--rollout-num-gpus", "3").config.num_engines == 3
        four = ("--rollout-num-gpus-per-engine", "4", "--sglang-dp-size", "4", "--sglang-ep-size", "4")
        assert resolve_8gpu(*four).config.num_engines == 2
        assert resolve_8gpu("--no-colocate", "--rollout-num-gpus", "16").config.num_engines == 2

    def test_the_prompt_gets_what_the_context_leaves(self, resolve_tiny: Try) -> None:
        resolved = resolve_tiny("--rollout-max-context-len", "64", "--rollout-max-response-len", "24")
        assert (resolved.max_context_len, resolved.max_prompt_len) == (64, 40)

    def test_clip_high_follows_eps_clip(self) -> None:
        assert GrpoConfig(eps_clip=0.3).clip_high == 0.3
        assert GrpoConfig(eps_clip=0.3, eps_clip_high=0.4).clip_high == 0.4
