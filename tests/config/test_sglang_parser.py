"""SGLang's own parser has the say over `--sglang-*` arguments, and the run need not wait while it is asked."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from config_support import Try

from recipe.config import resolve
from recipe.config.loading import shipped_recipes
from recipe.engines import argument_check
from recipe.engines.argument_check import ArgumentCheck, _of_given, _of_left_out, check_arguments
from recipe.system.errors import UserError

Install = Callable[[Path], None]
ASK_ABOUT_ALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from ask_sglang import ask
print(json.dumps([ask(words) for words in json.load(sys.stdin)]))
"""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Takes an interpreter for the one that has SGLang."""
    return lambda python: monkeypatch.setattr(argument_check, "find_sglang_python", lambda named: python)


@pytest.fixture
def refusal(resolve_8gpu: Try) -> Callable[..., str]:
    """The sentence that SGLang's parser refuses the 8-GPU recipe with more flags with."""

    def refused(*flags: str) -> str:
        resolved = resolve_8gpu(*flags)
        with pytest.raises(UserError) as error:
            check_arguments(resolved)
        return str(error.value)

    return refused


class TestRealSglang:
    """The installed SGLang's, asked with its own interpreter."""

    @pytest.mark.sglang
    @pytest.mark.slow
    def test_it_accepts_the_shipped_recipes_and_knows_its_arguments(
        self, sglang_python: Path, checkpoint: Path, resolve_8gpu: Try
    ) -> None:
        """One process is asked about all of them, and about arguments that are none: it imports SGLang for seconds."""
        names = [name for name in shipped_recipes() if name.startswith("glm")]
        recipes = [resolve(["--recipe", name, "--hf-checkpoint", str(checkpoint)]) for name in names]
        wrong = ["--sglang-mem-fraction-statik", "0.7", "--sglang-dllm-fdfo", "false", "--sglang-enable-x", "false"]
        wrong += ["--sglang-enable-dp-lm-head", "false", "--sglang-enable-metrics", "true"]
        recipes.append(resolve_8gpu(*wrong))
        assert {recipe.config.rollout.engine for recipe in recipes} == {"sglang"}
        words = [["--model-path", str(checkpoint), *recipe.config.sglang.command_line()] for recipe in recipes]
        ended = subprocess.run(
            [sglang_python, "-c", ASK_ABOUT_ALL, argument_check._ASK.parent],
            input=json.dumps(words),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert ended.returncode == 0, ended.stderr
        answers = json.loads(ended.stdout.splitlines()[-1])
        problems = {}
        for name, recipe, answer in zip([*names, "wrong"], recipes, answers, strict=True):
            known = [f"--sglang-{flag.removeprefix('--')}" for flag in answer["known"]]
            problems[name] = [*_of_given(answer, known), *_of_left_out(recipe.sglang_left_out, known)]
        statik, fdfo, enable_x = problems.pop("wrong")
        assert statik.endswith("SGLang has no such argument; did you mean --sglang-mem-fraction-static?")
        assert fdfo == (
            "--sglang-dllm-fdfo false leaves SGLang's own default as it is; --sglang-no-dllm-fdfo turns it off"
        )
        assert enable_x.startswith("--sglang-enable-x false: SGLang has no such argument")
        assert problems == {name: [] for name in names}
        assert len(names) > 5


def test_an_environment_without_sglang_is_told(refusal: Callable[..., str], install: Install) -> None:
    install(Path(sys.executable))
    told = refusal()
    assert told.startswith(f"SGLang's arguments cannot be checked with {sys.executable} (--rollout-engine-python): ")
    assert "sglang" in told.partition("): ")[2]
    install(Path("/nowhere/python"))
    assert "No such file" in refusal()


class TestParser:
    @pytest.fixture(autouse=True)
    def sglang(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
        """A package that answers to SGLang's name with a parser of a few arguments."""
        folder = tmp_path / "site" / "sglang" / "srt"
        (folder / "utils").mkdir(parents=True)
        for package in (folder.parent, folder, folder / "utils"):
            (package / "__init__.py").touch()
        (folder / "server_args.py").write_text(
            textwrap.dedent("""
                import argparse, os, time
                while not os.path.exists(os.environ.get("ANSWERS_WITH", "/")):
                    time.sleep(0.05)
                class ServerArgs:
                    @staticmethod
                    def add_cli_args(parser):
                        parser.add_argument("--model-path", required=True)
                        parser.add_argument("--mem-fraction-static", type=float)
                        for name in ("dp", "ep", "moe-dense-tp"):
                            parser.add_argument(f"--{name}-size", type=int)
                        for name in ("cuda-graph-max-bs-decode", "max-running-requests"):
                            parser.add_argument(f"--{name}", type=int)
                        parser.add_argument("--cuda-graph-bs-decode", type=int, nargs="+")
                        parser.add_argument("--sampling-backend", choices=["pytorch", "flashinfer"])
                        parser.add_argument("--enable-dp-attention", action="store_true")
                        parser.add_argument("--enable-dp-lm-head", action="store_true")
                        parser.add_argument("--dllm-fdfo", action=argparse.BooleanOptionalAction)
            """)
        )
        install(Path(sys.executable))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def test_known_arguments_pass(self, resolve_8gpu: Try) -> None:
        flags = ["--sglang-enable-dp-lm-head", "false", "--sglang-no-dllm-fdfo", "--sglang-cuda-graph-bs", "1", "2"]
        with ArgumentCheck(resolve_8gpu("--sglang-sampling-backend", "pytorch", *flags)) as check:
            check.finish()
            assert check._process is not None
            assert check._process.returncode == 0

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (
                ["--sglang-mem-fraction-statik", "0.7"],
                "--sglang-mem-fraction-statik: SGLang has no such argument; did you mean --sglang-mem-fraction-static?",
            ),
            (["--sglang-mem-fraction-static", "most"], "argument --mem-fraction-static: invalid float value: 'most'"),
            (["--sglang-mem-fraction-static", "true"], "argument --mem-fraction-static: expected one argument"),
            (["--sglang-sampling-backend", "numpy"], "argument --sampling-backend: invalid choice: 'numpy'"),
            (["--sglang-enable-dp-lm-head", "yes"], "'yes' is too much"),
            (["--sglang-mem-fraction", "0.7"], "--sglang-mem-fraction: SGLang has no such argument"),
            (
                ["--sglang-enable-dp-lm-heat", "false"],
                "-lm-heat false: SGLang has no such argument; did you mean --sglang-enable-dp-lm-head?",
            ),
            (["--sglang-dllm-fdfo", "false"], "--sglang-no-dllm-fdfo turns it off"),
        ],
    )
    def test_unknown_ones_do_not(self, refusal: Callable[..., str], flags: list[str], sentence: str) -> None:
        assert sentence in refusal(*flags)

    def test_a_sglang_without_token_versions_is_refused_for_updates_in_flight(
        self, refusal: Callable[..., str], resolve_8gpu: Try, tmp_path: Path
    ) -> None:
        flags = ["--async-rollout", "--async-order", "finished", "--update-weight-in-flight", "keep"]
        flags += ["--no-colocate", "--rollout-num-gpus", "8"]
        told = refusal(*flags)
        assert told.startswith(
            f"--update-weight-in-flight keep: the SGLang of {sys.executable} does not tell the weight"
        )
        (tmp_path / "site" / "sglang" / "srt" / "utils" / "weight_versions.py").touch()
        check_arguments(resolve_8gpu(*flags))

    def test_the_embedded_engine_does_not_ask_it(self, resolve_tiny: Try, install: Install) -> None:
        install(Path("/nowhere/python"))
        with ArgumentCheck(resolve_tiny()) as check:
            assert check._process is None
            check.finish()

    def test_nobody_waits_until_the_answer_is_needed(
        self, resolve_8gpu: Try, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        may_answer = tmp_path / "may answer"
        monkeypatch.setenv("ANSWERS_WITH", str(may_answer))
        with ArgumentCheck(resolve_8gpu("--sglang-sampling-backend", "numpy")) as check:
            may_answer.touch()
            with pytest.raises(UserError, match="invalid choice: 'numpy'"):
                check.finish()

    def test_a_question_that_is_given_up_leaves_no_process(
        self, resolve_8gpu: Try, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ANSWERS_WITH", "nothing")
        resolved = resolve_8gpu()
        with ArgumentCheck(resolved):
            [asked] = [p for p in psutil.Process(os.getpid()).children() if "ask_sglang.py" in " ".join(p.cmdline())]
        assert not asked.is_running()

    def test_a_parser_that_does_not_answer_is_told(
        self, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ANSWERS_WITH", "nothing")
        monkeypatch.setattr(argument_check, "TIMEOUT_S", 0.2)
        assert refusal().endswith("(--rollout-engine-python): no answer in 0.2 s")
