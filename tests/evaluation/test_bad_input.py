"""A user's mistakes, a sentence each."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from evaluation_support import N_SAMPLES, QUESTIONS, KnownServer, evaluate, open_one
from transformers import AutoTokenizer

from evaluation.aime import main
from evaluation.options import parse
from evaluation.result import read_result
from recipe.system.errors import UserError, run_main

GOOD = {"id": "1", "prompt": "1+1=", "label": "2"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([GOOD, {"id": "2", "prompt": "1+2="}], "line 2: there is no field 'label'"),
        ([GOOD, GOOD | {"id": "2", "prompt": "?", "label": "1/2"}], "line 2: the label '1/2' .* is no integer"),
        ([GOOD | {"label": "1000"}], "line 1: the label '1000' .* is not between 0 and 999"),
        ([GOOD | {"label": "-1"}], "line 1: the label '-1' .* is not between 0 and 999"),
        ([GOOD | {"label": 2.5}], "line 1: the label '2.5' .* is no integer"),
        ([GOOD | {"label": None}], "line 1: the label null is no answer"),
        ([GOOD, GOOD | {"prompt": "1+2="}], "lines 1 and 2 have the same 'id', '1'"),
        ([GOOD, GOOD | {"id": 1, "prompt": "1+2="}], "lines 1 and 2 have the same 'id', '1'"),
        ([GOOD, GOOD | {"id": "2"}], "lines 1 and 2 ask the same"),
        ([GOOD | {"id": True}], "line 1: 'id' is neither a text nor a number"),
        ([{"label": "2"}], "line 1: there is no field 'prompt'"),
        ([GOOD | {"prompt": "1+" * 40}], "the prompt has .* tokens, but the context leaves room for 52"),
        ([], "holds no prompts"),
    ],
)
def test_a_bad_file(lines: list[dict], problem: str, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=problem):
        open_one("--model", checkpoint, "--data", data, "--save", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_problems_without_names_are_named_by_their_lines(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text('{"prompt": "1+1=", "label": 2}\n\n{"prompt": "1+2=", "label": "003"}\n')
    evaluation = open_one("--model", checkpoint, "--data", data, "--save", tmp_path / "out")
    assert [problem.name for problem in evaluation.plan.problems] == ["1", "3"]


def test_a_model_without_a_chat_template(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors" or file.name == "config.json":
            (bare / file.name).symlink_to(file)
    with pytest.raises(UserError, match="has no chat template"):
        open_one("--model", bare, "--data", data, "--save", tmp_path / "out")


def test_an_unreachable_server(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no server answers at http://127\.0\.0\.1:9/health_generate"):
        open_one("--url", "http://127.0.0.1:9", "--data", data, "--save", tmp_path / "out")


def test_a_result_of_other_settings(server: KnownServer, data: Path, tmp_path: Path) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    evaluate(*words)
    with pytest.raises(UserError, match=r"sampling.temperature was 1.0 and is 0.5\): choose another --save"):
        evaluate(*words, "--temperature", 0.5)
    data.write_text(data.read_text().replace("1+2=", "1+3="))
    with pytest.raises(UserError, match="data_sha256 was"):
        evaluate(*words)
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json"):
        evaluate(*words)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--profile", "model-card", "--top-p", "1"], "--top-p 1.0 contradicts --profile model-card"),
        (["--max-response-len", "64"], "--max-response-len 64 leaves no room for a prompt in a context of 64 tokens"),
        (["--n-samples", "0"], "--n-samples must be greater than 0"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--hf-checkpoint", "x"], "--hf-checkpoint says nothing beside --model"),
        (["--context-length", "0"], "--context-length must be greater than 0"),
        (["--stall-timeout-s", "0"], "--stall-timeout-s must be greater than 0"),
        (["--grade-timeout-s", "0"], "--grade-timeout-s must be greater than 0 and at most 86400 seconds"),
        (["--grade-timeout-s", "86401"], "--grade-timeout-s must be greater than 0 and at most 86400 seconds"),
        (["--engine-args", "'--tp-size 2"], "--engine-args .* cannot be split into words"),
    ],
)
def test_values_that_cannot_be(words: list[str], problem: str, checkpoint: Path, data: Path) -> None:
    if "--profile" in words:
        words = [*words, "--max-response-len", "131072"]
    with pytest.raises(UserError, match=problem):
        open_one("--model", checkpoint, "--data", data, *words)


def test_models_that_are_not_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no Hugging Face checkpoint: it has no config.json"):
        open_one("--model", tmp_path, "--data", data)
    with pytest.raises(UserError, match="is no torch_dist checkpoint"):
        open_one("--checkpoint", tmp_path, "--hf-checkpoint", tmp_path, "--data", data)
    (tmp_path / ".metadata").touch()
    with pytest.raises(UserError, match=r"no run's manifest.json lies above .* give --hf-checkpoint"):
        open_one("--checkpoint", tmp_path, "--data", data)


def test_a_mistake_ends_the_command_with_its_sentence(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["aime", "--url", "http://127.0.0.1:9", "--data", str(data)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no server answers")
    assert "Traceback" not in said


def test_a_file_that_is_no_result(server: KnownServer, data: Path, tmp_path: Path) -> None:
    evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out")
    path = tmp_path / "out" / "result.json"
    content = json.loads(path.read_text())
    for changed, problem in [
        ("[]", "is no result of evaluation.aime"),
        ("{", "cannot be read"),
        (json.dumps(content | {"schema_version": 0}), "is no result of evaluation.aime of schema version 2"),
        (json.dumps(content | {"notes": 5}), "is damaged: notes"),
    ]:
        path.write_text(changed)
        with pytest.raises(UserError, match=problem):
            read_result(path.parent)
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match=r"is no result of evaluation.aime: it has 1,099.5 GB, so give result\.json"):
        read_result(path)


@pytest.mark.parametrize(
    "flag", ["--temperature", "--top-p", "--request-timeout-s", "--grade-timeout-s", "--stall-timeout-s"]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_are_none(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(None, ["--model", "m", "--data", "d", f"{flag}={value}"])
    assert ended.value.code == 2
    assert f"argument {flag}: invalid finite value: '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read"),
        ("[]", "is not what it should be"),
        ("", "cannot be read"),
        ("{}", "holds the samples of other"),
    ],
)
def test_damaged_settings(server: KnownServer, data: Path, tmp_path: Path, content: str, problem: str) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    evaluate(*words)
    (tmp_path / "out" / "settings.json").write_text(content)
    with pytest.raises(UserError, match=rf"{problem}.*choose another --save"):
        evaluate(*words)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"sample": "0"}, "sample: Input should be a valid integer"),
        ({"sample": 99}, f"is sample 99 of {N_SAMPLES}"),
        ({"sample": -1}, f"is sample -1 of {N_SAMPLES}"),
        ({"tokens": None}, "tokens: Input should be a valid integer"),
        ({"response": 5}, "response: Input should be a valid string"),
        ({"finish_reason": "tired"}, "finish_reason: Input should be"),
        ({"finish_reason": ["stop"]}, "finish_reason: Input should be"),
        ({"problem": []}, "problem: Input should be a valid string"),
        ({"problem": "nobody's"}, 'a problem "nobody\'s" that is not asked'),
        ({"more": 1}, "more: Unexpected keyword argument"),
        (None, "is no sample"),
    ],
)
def test_a_stored_line_that_is_no_sample(
    server: KnownServer, data: Path, tmp_path: Path, changed: dict[str, object] | None, problem: str
) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    evaluate(*words)
    samples = tmp_path / "out" / "samples.jsonl"
    first, rest = samples.read_text().split("\n", 1)
    samples.write_text(json.dumps(changed and json.loads(first) | changed) + "\n" + rest)
    with pytest.raises(UserError, match=rf"samples\.jsonl.*{problem}.*remove the line"):
        evaluate(*words)


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ("<html>", "answered with damaged JSON"),
        ("[]", "did not answer with a JSON object"),
        ("null", "did not answer with a JSON object"),
        ("{}", "is no SGLang server: its /model_info has no 'model_path'"),
        ("\udcff", "answered with damaged JSON"),
    ],
)
def test_a_server_of_something_else(server: KnownServer, data: Path, tmp_path: Path, info: str, problem: str) -> None:
    server.info = info
    with pytest.raises(UserError, match=problem):
        open_one("--url", server.url, "--data", data, "--save", tmp_path / "out")


def test_only_one_evaluation_works_in_a_directory(server: KnownServer, data: Path, tmp_path: Path) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    with open_one(*words) as first:
        before = (tmp_path / "out" / "samples.jsonl").exists()
        with pytest.raises(UserError, match=r"another evaluation is at work in .*out: wait until it has ended"):
            open_one(*words)
        assert (tmp_path / "out" / "samples.jsonl").exists() == before
        first.complete()
    assert evaluate(*words).score.samples == N_SAMPLES * len(QUESTIONS)


def test_engine_arguments_beside_a_server(server: KnownServer, data: Path) -> None:
    with pytest.raises(UserError, match="--engine-args says nothing beside --url"):
        open_one("--url", server.url, "--data", data, "--engine-args", "--tp-size 2")


def fake_run(folder: Path, checkpoint: Path, steps: Sequence[int]) -> Path:
    """A training run's directory with checkpoints, as far as an evaluation looks before it exports."""
    for step in steps:
        iteration = folder / "checkpoints" / f"iter_{step:07}"
        iteration.mkdir(parents=True)
        for name in (".metadata", "progress.json", "__0_0.distcp"):
            (iteration / name).write_text(f"{name} of {step}")
    manifest = {"config": {"model": {"hf_checkpoint": str(checkpoint)}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "checkpoints"


def test_a_checkpoint_is_chosen_once_and_its_run_knows_the_model(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = fake_run(tmp_path / "run", checkpoint, [1, 2])
    exported: list[tuple[Path, Path]] = []

    def export(source: Path, origin: Path, target: Path) -> None:
        exported.append((source, origin))
        raise UserError("that is enough")

    monkeypatch.setattr("evaluation.aime.export_checkpoint", export)
    words = ("--checkpoint", checkpoints, "--data", data, "--save", tmp_path / "out", "--engine", "embedded")
    with open_one(*words) as evaluation:
        fake_run(tmp_path / "run", checkpoint, [3])
        with pytest.raises(UserError, match="that is enough"):
            evaluation.complete()
    assert exported == [(checkpoints / "iter_0000002", checkpoint)]
    newest = r"holds the samples of iter_0000002, but the newest checkpoint of \S+ is iter_0000003 by now: "
    with pytest.raises(
        UserError, match=rf"{newest}give --checkpoint (\S+) to go on, or choose another --save"
    ) as moved:
        open_one(*words)
    with pytest.raises(UserError, match="model_sha256 was"):
        open_one("--checkpoint", checkpoints / "iter_0000003", *words[2:])
    named = str(moved.value).split("--checkpoint ")[1].split()[0]
    open_one("--checkpoint", named, *words[2:]).__exit__()
    shutil.rmtree(checkpoints / "iter_0000002")
    with pytest.raises(UserError, match=rf"{newest}restore {checkpoints / 'iter_0000002'}, or choose another --save"):
        open_one(*words)
