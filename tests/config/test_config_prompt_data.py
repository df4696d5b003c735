"""Several prompt files and their weights, as they are spelled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from config_support import Refusal, Try

from recipe.again.alone import read_config
from recipe.config import Config
from recipe.config.fields import PromptData
from recipe.run.manifest import public_config

Files = tuple[PromptData, ...]
OfWords = Callable[..., Files]


@pytest.fixture
def files_of(resolve_8gpu: Try) -> OfWords:
    def files(*words: str) -> Files:
        return resolve_8gpu("--prompt-data", *words).config.data.prompt_data

    return files


def test_files_have_weights_or_none(files_of: OfWords) -> None:
    assert files_of("/a.jsonl") == ((Path("/a.jsonl"), None),)
    assert files_of("/a.jsonl", "/b.jsonl") == ((Path("/a.jsonl"), None), (Path("/b.jsonl"), None))
    weighted = files_of("/a.jsonl:0.7", "/b.parquet:3e-1")
    assert weighted == ((Path("/a.jsonl"), 0.7), (Path("/b.parquet"), 0.3))
    assert [file.name for file in weighted] == ["a", "b"]
    assert files_of("/a.jsonl:1") == ((Path("/a.jsonl"), 1.0),)
    thirds = files_of("/a:0.333333", "/b:0.333333", "/c:0.333334")
    assert [file.weight for file in thirds] == [0.333333, 0.333333, 0.333334]


def test_a_path_may_hold_a_colon(files_of: OfWords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_colon = tmp_path / "of:0.5"
    assert files_of(f"{with_colon}:0.25", "/b:0.75")[0] == (with_colon, 0.25)
    assert files_of(f"{tmp_path}/of:jsonl") == ((tmp_path / "of:jsonl", None),)
    with_colon.touch()
    assert files_of(str(with_colon)) == ((with_colon, None),)
    assert files_of(f"{with_colon}:0.25", "/b:0.75")[0] == (with_colon, 0.25)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files_of("~/of:0.5") == ((with_colon, None),)
    assert files_of("~/a:0.5", "$HOME/b:0.5") == ((tmp_path / "a", 0.5), (tmp_path / "b", 0.5))


@pytest.mark.parametrize(
    "toml",
    [
        'prompt_data = "/a.jsonl"',
        'prompt_data = ["/a.jsonl"]',
        'prompt_data = ["/a.jsonl:0.7", "/b.jsonl:0.3"]',
        'prompt_data = [["/a.jsonl", 0.7], ["/b.jsonl", 0.3]]',
    ],
)
def test_a_recipe_a_manifest_and_a_command_line_say_the_same(
    resolve_8gpu: Try, files_of: OfWords, tmp_path: Path, toml: str
) -> None:
    (tmp_path / "r.toml").write_text(f'extends = "glm4.7-flash-8gpu"\n[data]\n{toml}\n')
    config = resolve_8gpu("--recipe", str(tmp_path / "r.toml")).config
    assert files_of(*map(str, config.data.prompt_data)) == config.data.prompt_data
    assert of_manifest(config, tmp_path) == config


def of_manifest(config: Config, folder: Path, **data: object) -> Config:
    """What is read of the manifest of a run of this configuration."""
    values = public_config(config)
    (folder / "manifest.json").write_text(json.dumps({"config": values | {"data": values["data"] | data}}))
    return read_config(folder)


def test_a_manifest_tells_a_path_with_a_colon_from_a_weight(resolve_8gpu: Try, tmp_path: Path) -> None:
    path = tmp_path / "of:0.5"
    path.touch()
    config = resolve_8gpu("--prompt-data", str(path)).config
    path.unlink()
    assert of_manifest(config, tmp_path).data.prompt_data == ((path, None),)


def test_a_manifest_of_before_there_were_weights_is_read(resolve_8gpu: Try, tmp_path: Path) -> None:
    config = resolve_8gpu("--prompt-data", "/a.jsonl").config
    assert of_manifest(config, tmp_path, prompt_data="/a.jsonl") == config


def test_the_table_of_the_configuration_shows_files_as_they_are_given(resolve_8gpu: Try) -> None:
    assert "prompt_data                = /a.jsonl " in resolve_8gpu("--prompt-data", "/a.jsonl").describe()
    assert " = /a:0.7 /b:0.3 " in resolve_8gpu("--prompt-data", "/a:0.7", "/b:0.3").describe()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ("/a:0.7", "/b:0.2"),
            "the weights add up to 0.9, and shares of the draws add up to 1: change them, or give none, and each file "
            "counts by its number of prompts",
        ),
        (("/a:7", "/b:3"), "the weights add up to 10, and shares of the draws"),
        (("/a:0.5",), "the weights add up to 0.5, and shares of the draws"),
        (("/a:0.50001", "/b:0.5"), "the weights add up to 1.00001, and shares of the draws"),
        (("/a:1", "/b:0"), "the weight of /b is not above 0: give it a share of the draws, or leave it out"),
        (("/a:1.5", "/b:-0.5"), "the weight of /b is not above 0"),
        (("/a", "/b:0.3"), "/a has no weight, and others have: give every file one, or none"),
        (("/x/train.jsonl", "/y/train.jsonl"), "two files have the name train, by which metrics tell them apart"),
        (("/a:nan", "/b:0.3"), "it should be a finite number"),
        ((":0.5", "/b:0.5"), "a path is empty, or has control characters"),
    ],
)
def test_what_is_wrong_with_weights_is_a_sentence(refusal: Refusal, words: tuple[str, ...], problem: str) -> None:
    assert refusal("--prompt-data", *words).startswith(f"--prompt-data {' '.join(words)} (flag): {problem}")


def test_a_weight_that_is_no_number_is_named_where_the_file_is_there(refusal: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert refusal("--prompt-data", f"{path}:0,7", "/b:0.3") == (
        f"--prompt-data {path}:0,7 /b:0.3 (flag): '0,7' is no weight for {path}: write a number, as in {path}:0.7"
    )


def test_a_recipe_names_a_file(refusal: Refusal, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    for value, problem in (("[]", "there is no file: name at least one"), ("7", "it should be a valid tuple")):
        recipe.write_text(f'extends = "glm4.7-flash-8gpu"\n[data]\nprompt_data = {value}\n')
        assert refusal("--recipe", str(recipe)) == f"data.prompt_data = {value} (recipe {recipe}): {problem}"
