import re
from pathlib import Path

import pytest
from config_support import Refusal, Try

from recipe.config.flags import FLAGS, Arity, parse_command_line, spell
from recipe.config.loading import Setting, read_settings
from recipe.config.sglang_rules import EngineLayout
from recipe.system.errors import UserError


def value_of(key: str, *argv: str) -> object:
    return parse_command_line(argv).values[key]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--rollout-batchsize", "3"], "unknown flag --rollout-batchsize; did you mean --rollout-batch-size?"),
        (["--colocated"], "unknown flag --colocated; did you mean --colocate?"),
        (["--recip", "tiny"], "unknown flag --recip; did you mean --recipe?"),
        (["--frobnicate-zzz"], "unknown flag --frobnicate-zzz"),
        (["tiny"], "unexpected argument 'tiny': everything is a flag, e.g. --recipe tiny"),
        (["--lr"], "--lr needs a value"),
        (["--lr", "1", "2"], "--lr takes one value, but is followed by '1 2'"),
        (["--colocate", "true"], "--colocate takes no value, but is followed by 'true'"),
        (["--eval-prompt-data"], "--eval-prompt-data needs at least one value"),
        (["--recipe"], "--recipe needs a value"),
    ],
)
def test_what_is_no_flag_is_refused(argv: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse_command_line(argv)
    assert str(error.value) == sentence


def test_prefixes_are_not_guessed() -> None:
    with pytest.raises(UserError, match="unknown flag --num-roll; did you mean --num-rollout"):
        parse_command_line(["--num-roll", "3"])


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--bf16", "model.bf16", True),
        ("--fp32", "model.bf16", False),
        ("--no-bf16", "model.bf16", False),
        ("--disable-bias-linear", "model.add_bias_linear", False),
        ("--add-bias-linear", "model.add_bias_linear", True),
        ("--no-rope-fusion", "model.apply_rope_fusion", False),
        ("--untie-embeddings-and-output-weights", "model.untie_embeddings_and_output_weights", True),
        ("--no-position-embedding", "model.add_position_embedding", False),
        ("--no-load-optim", "checkpoint.no_load_optim", True),
        ("--load-optim", "checkpoint.no_load_optim", False),
        ("--no-colocate", "cluster.colocate", False),
        ("--no-grpo-std", "grpo.disable_grpo_std_normalization", True),
        ("--disable-grpo-std-normalization", "grpo.disable_grpo_std_normalization", True),
    ],
)
def test_switches(flag: str, key: str, value: bool) -> None:
    assert value_of(key, flag) is value


def test_values_may_follow_an_equals_sign_or_start_with_a_dash() -> None:
    assert value_of("optimizer.lr", "--lr=1e-6") == "1e-6"
    assert value_of("rollout.rollout_top_k", "--rollout-top-k", "-1") == "-1"
    assert value_of("rollout.rollout_stop", "--rollout-stop=--end") == ["--end"]


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert value_of("optimizer.lr", "--lr", "1", "--lr", "2") == "2"
    assert value_of("cluster.colocate", "--colocate", "--no-colocate") is False


def test_several_evaluation_sets(resolve_8gpu: Try, refusal: Refusal) -> None:
    flags = ("--eval-prompt-data", "aime", "/a.jsonl", "math", "/m.jsonl")

    assert [prompts.name for prompts in resolve_8gpu(*flags).config.eval.eval_prompt_data] == ["aime", "math"]
    assert refusal("--eval-prompt-data", "aime") == (
        "--eval-prompt-data aime (flag): expected pairs of NAME PATH, got 1 values"
    )


def test_what_a_recipe_sets_is_unset_by_none(resolve_8gpu: Try, refusal: Refusal) -> None:
    assert resolve_8gpu("--eval-prompt-data", "none").config.eval.eval_prompt_data == ()
    assert resolve_8gpu("--eval-interval", "none").config.eval.eval_interval is None
    assert "--lr" in refusal("--lr", "none"), "nothing goes on without it"
    assert value_of("model.position_embedding_type", "--position-embedding-type", "none") == "none", (
        "a value of its own"
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], True),
        (["True"], "True"),
        (["8"], 8),
        (["-1"], -1),
        (["0.7"], 0.7),
        (["EAGLE"], "EAGLE"),
        (["007"], "007"),
        (["1e-06"], 1e-06),
        (["1e-6"], "1e-6"),
        (["nan"], "nan"),
        (["1", "2", "x"], [1, 2, "x"]),
    ],
)
def test_sglang_values_reach_sglang_as_they_were_written(words: list[str], value: object, resolve_8gpu: Try) -> None:
    assert value_of("sglang.args.some_thing", "--sglang-some-thing", *words) == value

    command_line = resolve_8gpu("--sglang-some-thing", *words).config.sglang.command_line()
    assert command_line[command_line.index("--some-thing") + 1 :] == words


def test_sglang_aliases_are_one_argument() -> None:
    assert value_of("sglang.args.ep_size", "--sglang-ep-size", "4", "--sglang-expert-parallel-size", "8") == 8


def test_false_leaves_an_sglang_argument_out(resolve_8gpu: Try, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('extends = "glm4.7-flash-8gpu"\n[sglang.args]\nenable-dp-lm-head = false\n')

    for told in (["--recipe", str(recipe)], ["--sglang-enable-dp-lm-head", "false"]):
        resolved = resolve_8gpu(*told)
        command_line = resolved.config.sglang.command_line()
        assert "--enable-dp-lm-head" not in command_line
        assert "--enable-dp-attention" in command_line
        assert resolved.sglang_left_out == ("enable_dp_lm_head",)
        assert re.search(r"args.enable_dp_lm_head +(= false)", resolved.describe())


@pytest.mark.parametrize("words", [["true"], []])
def test_true_is_as_the_bare_switch_and_takes_a_false_back(resolve_8gpu: Try, tmp_path: Path, words: list[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('extends = "glm4.7-flash-8gpu"\n[sglang.args]\nenable-dp-lm-head = false\n')

    resolved = resolve_8gpu("--recipe", str(recipe), "--sglang-enable-dp-lm-head", *words)
    command_line = resolved.config.sglang.command_line()
    assert command_line.count("--enable-dp-lm-head") == 1
    assert "true" not in command_line
    assert resolved.sglang_left_out == ()


def test_an_engine_is_laid_out_without_what_is_left_out(resolve_8gpu: Try) -> None:
    unset = ("enable_dp_attention", "enable_dp_lm_head", "dp_size", "moe_dense_tp_size", "speculative_algorithm")
    flags = [word for name in unset for word in (f"--sglang-{name}", "false")]
    recipe = ["--recipe", "glm4.7-flash-8gpu-eagle", "--rollout-num-gpus-per-engine", "1", "--sglang-ep-size", "1"]

    config = resolve_8gpu(*recipe, *flags).config
    layout = EngineLayout.of(config)
    assert (layout.dp, layout.dp_attention) == (1, False)
    assert not config.sglang.args.keys() & set(unset)


@pytest.mark.parametrize("key", sorted({flag.key for flag in FLAGS.values() if flag.arity is Arity.SWITCH}))
def test_every_switch_of_a_recipe_is_unset_by_a_flag(key: str, tmp_path: Path) -> None:
    group, name = key.split(".")
    for value in (True, False):
        recipe = tmp_path / "r.toml"
        recipe.write_text(f"[{group}]\n{name} = {str(value).lower()}\n")
        settings = read_settings(parse_command_line(["--recipe", str(recipe), spell(key, not value)]))
        assert settings[key] == Setting(not value, "flag")


def test_a_field_is_spelled_as_it_was_given() -> None:
    assert spell("model.bf16", False) == "--no-bf16"
    assert spell("rollout.engine", "sglang") == "--rollout-engine sglang"
    assert spell("sglang.args.ep_size", 8) == "--sglang-ep-size 8"
    assert spell("sglang.args.enable_dp_attention", False) == "--sglang-enable-dp-attention false"


class TestLayerPattern:
    @pytest.mark.parametrize("text", ["[0]*1+[1]*46", "[0] + [1]*46", "[0]+[1]*23*2", str([0] + [1] * 46)])
    def test_megatrons_forms(self, resolve_8gpu: Try, text: str) -> None:
        assert resolve_8gpu("--moe-layer-freq", text).config.model.moe_layer_freq == (0,) + (1,) * 46

    @pytest.mark.parametrize(
        "text", ["__import__('os')", "[0]*", "[0]*10**9", "[1]*99999999", "[a]", "1.5", "[0]-[1]", "", "[[0]]"]
    )
    def test_nothing_else(self, refusal: Refusal, text: str) -> None:
        assert "is no layer pattern; write it like '[0]*1+[1]*46'" in refusal(f"--moe-layer-freq={text}")

    def test_other_numbers(self, refusal: Refusal) -> None:
        assert "0 (dense) or 1 (experts)" in refusal("--moe-layer-freq", "[2]*47")
        assert "N is at least 1" in refusal("--moe-layer-freq", "0")
