from pathlib import Path

import pytest
from config_support import Refusal, Try, WriteCheckpoint

from recipe.config import resolve
from recipe.config.loading import shipped_recipes
from recipe.system.errors import UserError


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        resolve(argv)
    return str(error.value)


class TestShippedRecipes:
    @pytest.mark.parametrize("name", shipped_recipes())
    def test_resolves(self, name: str, checkpoint: Path) -> None:
        assert resolve(["--recipe", name, "--hf-checkpoint", str(checkpoint)]).config.misc.name == name

    def test_the_promised_ones_are_there(self) -> None:
        kinds = ("8gpu", "8gpu-eagle", "8gpu-mtp", "8gpu-fast", "16gpu", "16gpu-fast", "24gpu", "24gpu-fast")
        kinds += ("16gpu-async", "24gpu-async")
        sizes = {f"glm4.7-flash-{kind}" for kind in kinds}
        assert {"tiny", "tiny-sft", "smoke", "smoke-sft", "smoke-cpu"} | sizes == set(shipped_recipes())

    def test_16_gpus(self, checkpoint: Path) -> None:
        config = resolve(["--recipe", "glm4.7-flash-16gpu", "--hf-checkpoint", str(checkpoint)]).config
        perf = config.perf
        assert (perf.tensor_model_parallel_size, perf.pipeline_model_parallel_size, perf.context_parallel_size) == (
            4,
            2,
            2,
        )
        assert perf.expert_model_parallel_size == 8
        assert not config.optimizer.optimizer_cpu_offload
        assert config.num_engines == 2

    def test_24_gpus_serve_one_engine_with_whole_experts(self, checkpoint: Path) -> None:
        config = resolve(["--recipe", "glm4.7-flash-24gpu", "--hf-checkpoint", str(checkpoint)]).config
        args = config.sglang.args
        assert (config.world_size, config.num_engines) == (24, 1)
        assert (args["ep_size"], args["dp_size"], args["ep_num_redundant_experts"]) == (24, 6, 8)

    def test_supervised_warm_up_needs_no_groups(self, checkpoint: Path) -> None:
        config = resolve(["--recipe", "tiny-sft", "--hf-checkpoint", str(checkpoint)]).config
        assert config.is_sft
        assert not config.needs_old_log_probs
        assert config.samples_per_rollout == config.rollout.rollout_batch_size


class TestSources:
    def test_every_value_knows_where_it_came_from(self, resolve_8gpu: Try) -> None:
        sources = resolve_8gpu("--recipe", "glm4.7-flash-24gpu", "--lr", "2e-6", "--sglang-dp-size", "12").sources
        assert sources["optimizer.lr"] == "flag"
        assert sources["sglang.args.dp_size"] == "flag"
        assert sources["sglang.args.ep_size"] == "recipe glm4.7-flash-24gpu.toml"
        assert sources["perf.tensor_model_parallel_size"] == "recipe glm4.7-flash-16gpu.toml"
        assert sources["rollout.num_rollout"] == "recipe glm4.7-flash-8gpu.toml"
        assert sources["misc.seed"] == "default"

    def test_flags_override_recipes(self, resolve_8gpu: Try) -> None:
        assert resolve_8gpu("--lr", "2e-6").config.optimizer.lr == 2e-6

    def test_the_table_shows_value_and_source(self, resolve_8gpu: Try) -> None:
        table = resolve_8gpu("--lr", "2e-6").describe()
        rows = [" ".join(line.split()) for line in table.splitlines()]
        assert "[optimizer]" in rows
        assert "lr = 2e-06 (flag)" in rows
        assert "args.dp_size = 8 (recipe glm4.7-flash-8gpu.toml)" in rows
        assert "seed = 1234 (default)" in rows
        assert "colocate = true (recipe glm4.7-flash-8gpu.toml)" in rows
        assert "num_hidden_layers = 47" in rows
        assert "data_parallel_size = 8" in rows
        assert any(row.startswith("note: the reference model is not run") for row in rows)
        assert not any(line.endswith(" ") for line in table.splitlines())


class TestRecipeFiles:
    def test_a_file_extends_a_shipped_recipe_and_another_file(self, tmp_path: Path, resolve_8gpu: Try) -> None:
        write(tmp_path / "base.toml", 'extends = "glm4.7-flash-8gpu"\n[optimizer]\nlr = 3e-6\n[misc]\nseed = 7\n')
        (tmp_path / "sub").mkdir()
        top = write(tmp_path / "sub" / "top.toml", 'extends = "../base.toml"\n[optimizer]\nlr = 4e-6\n')

        resolved = resolve_8gpu("--recipe", top)
        assert (resolved.config.optimizer.lr, resolved.config.misc.seed) == (4e-6, 7)
        assert resolved.sources["optimizer.lr"] == f"recipe {top}"
        assert resolved.sources["misc.seed"] == f"recipe {tmp_path / 'base.toml'}"

    def test_a_circle(self, tmp_path: Path) -> None:
        write(tmp_path / "a.toml", 'extends = "b.toml"')
        write(tmp_path / "b.toml", 'extends = "a.toml"')
        sentence = refused("--recipe", str(tmp_path / "a.toml"))
        assert sentence == "recipes extend one another in a circle: a.toml -> b.toml -> a.toml"

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("[optimizer]\nlearning_rat = 1", "unknown key learning_rat in [optimizer]"),
            ("[optimizer]\nadam_bta1 = 1", "unknown key adam_bta1 in [optimizer]; did you mean adam_beta1?"),
            ("[grpo]\nlr = 1", "unknown key lr in [grpo]; it belongs in [optimizer]"),
            ("[optimiser]\nlr = 1", "unknown table [optimiser]; did you mean optimizer?"),
            ("lr = 1", "unknown table [lr]"),
            ("optimizer = 1", "optimizer must be a table, not 1"),
            ("[sglang]\nargs = 3", "sglang.args must be a table, not 3"),
        ],
    )
    def test_unknown_keys_name_the_file_and_the_nearest(self, tmp_path: Path, text: str, sentence: str) -> None:
        path = write(tmp_path / "r.toml", text)
        told = refused("--recipe", path)
        assert sentence in told
        assert f"recipe {path}" in told

    @pytest.mark.parametrize("text", ["[optimizer", "extends = 3", 'extends = "nowhere"'])
    def test_unreadable(self, tmp_path: Path, text: str) -> None:
        path = write(tmp_path / "r.toml", text)
        assert "recipe" in refused("--recipe", path)

    def test_no_such_recipe(self) -> None:
        sentence = refused("--recipe", "glm4.7-flash-8gpus")
        assert sentence.startswith("there is no recipe glm4.7-flash-8gpus; did you mean glm4.7-flash-8gpu?")
        assert "there is no recipe nope.toml" in refused("--recipe", "nope.toml")


class TestValues:
    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--lr", "-1"], "--lr -1 (flag): it should be greater than 0"),
            (["--lr", "fast"], "--lr fast (flag): it should be a valid number, unable to parse string as a number"),
            (["--num-rollout", "0"], "--num-rollout 0 (flag): it should be greater than 0"),
            (["--num-rollout", "1.5"], "--num-rollout 1.5 (flag): it should be a valid integer"),
            (["--rm-type", "maths"], "--rm-type maths (flag): it should be 'deepscaler', 'math' or 'dapo'"),
            (["--eps-clip-c", "1"], "--eps-clip-c 1 (flag): it should be greater than 1"),
            (["--eval-top-p", "1.1"], "--eval-top-p 1.1 (flag): it should be less than or equal to 1"),
            (["--rollout-top-k", "0"], "--rollout-top-k 0 (flag): 0 tokens to sample from"),
            (["--lr", "nan"], "--lr nan (flag): it should be a finite number"),
            (["--name", "../up"], "--name ../up (flag): "),
            (["--name", ".."], "--name .. (flag): "),
            (["--custom-rm-path", "module"], "--custom-rm-path module (flag): "),
            (["--load", ""], "--load  (flag): a path is empty, or has control characters"),
            (["--save", "a\tb"], "--save a\tb (flag): a path is empty, or has control characters"),
            (["--input-key", "\0"], "--input-key \0 (flag): "),
            (["--eval-temperature", "1e39"], "--eval-temperature 1e39 (flag): it should be less than or equal to 100"),
            (["--num-cpus-per-engine", "9" * 40], "--num-cpus-per-engine 9999"),
            (
                ["--apply-chat-template-kwargs", "[1]"],
                "--apply-chat-template-kwargs [1] (flag): it should be a valid dict",
            ),
            (
                ["--apply-chat-template-kwargs", "{a}"],
                "--apply-chat-template-kwargs {a} (flag): no JSON object, such as",
            ),
            (["--apply-chat-template-kwargs", "[]"], "--apply-chat-template-kwargs [] (flag): it should be a valid"),
            (["--apply-chat-template-kwargs", "{a"], "--apply-chat-template-kwargs {a (flag): no JSON object"),
        ],
    )
    def test_out_of_bounds(self, refusal: Refusal, flags: list[str], sentence: str) -> None:
        assert refusal(*flags).startswith(sentence)

    def test_what_a_refusal_quotes_is_cut(self, refusal: Refusal) -> None:
        assert len(refusal("--moe-layer-freq", "(" * 5000)) < 400

    def test_paths_are_what_a_shell_makes_of_them(self, resolve_8gpu: Try, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        config = resolve_8gpu("--runs-dir=~/runs", "--save", "$HOME/saved", "--eval-prompt-data", "a", "~/a").config
        assert (config.misc.runs_dir, config.save_dir) == (Path("/home/me/runs"), Path("/home/me/saved"))
        assert config.eval.eval_prompt_data[0].path == Path("/home/me/a")

    def test_template_arguments_are_a_json_object(self, resolve_8gpu: Try) -> None:
        config = resolve_8gpu("--apply-chat-template-kwargs", '{"enable_thinking": false}').config
        assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}

    def test_a_recipes_value_names_the_recipe(self, tmp_path: Path, refusal: Refusal) -> None:
        path = write(tmp_path / "r.toml", 'extends = "glm4.7-flash-8gpu"\n[optimizer]\nlr = -1\n')
        assert refusal("--recipe", path) == f"optimizer.lr = -1 (recipe {path}): it should be greater than 0"

    def test_all_wrong_values_are_told_at_once(self, refusal: Refusal) -> None:
        sentence = refusal("--lr", "-1", "--num-rollout", "0")
        assert sentence.startswith("2 problems:\n  - ")
        assert "--lr -1" in sentence
        assert "--num-rollout 0" in sentence

    def test_what_is_missing_is_told_as_flags(self) -> None:
        sentence = refused("--lr", "1e-6")
        assert sentence.startswith("not set: --hf-checkpoint, --prompt-data, --num-rollout, --rollout-batch-size, ")
        assert "--lr" not in sentence
        assert "--recipe" in sentence


def test_a_tiny_checkpoint_resolves(write_checkpoint: WriteCheckpoint) -> None:
    checkpoint = write_checkpoint(num_hidden_layers=4, num_nextn_predict_layers=1, vocab_size=64, dtype="float32")
    assert resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint)]).architecture.num_hidden_layers == 4
