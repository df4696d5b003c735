"""What is fetched, verified, recorded and left alone when all is well."""

import hashlib
import json
import shutil
from datetime import datetime

import pytest
from hub_contents import DATA, DATA_FILES, MODEL, MODEL_FILES, NEEDED, ROWS, SHARD

from recipe.download.__main__ import main
from recipe.system.errors import UserError


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "download.json"}


def record(directory):
    return json.loads((directory / "download.json").read_text())


def test_only_the_files_needed_are_fetched_and_recorded(hub, model, directory):
    model()
    assert contents(directory) == {name: MODEL_FILES[name] for name in NEEDED}
    assert hub.fetched() == {name: [None] for name in NEEDED}
    written = record(directory)
    assert datetime.fromisoformat(written.pop("downloaded_at")).tzinfo is not None
    assert written == {
        "repo": "zai-org/GLM-4.7-Flash",
        "repo_type": "model",
        "revision": "main",
        "commit": hub.resolve(MODEL, "main"),
        "files": {
            name: {"bytes": len(MODEL_FILES[name]), "sha256": hashlib.sha256(MODEL_FILES[name]).hexdigest()}
            for name in NEEDED
        },
    }


def test_a_data_set_is_recorded_with_its_rows(hub, data, directory, capsys):
    data()
    content = ROWS.encode()
    assert contents(directory) == {"aime-2024.jsonl": content}
    digest = hashlib.sha256(content).hexdigest()
    assert record(directory)["files"] == {"aime-2024.jsonl": {"bytes": len(content), "sha256": digest, "rows": 9}}
    assert f"is complete and verified, 9 rows, {len(content)} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--dry-run",), ("--revision", "COMMIT")])
def test_a_complete_copy_is_hashed_again_without_network(hub, model, directory, capsys, flags):
    model()
    before = (directory / "download.json").read_bytes()
    hub.requests.clear()
    model(*(hub.resolve(MODEL, "main") if flag == "COMMIT" else flag for flag in flags))
    assert hub.requests == []
    assert (directory / "download.json").read_bytes() == before
    assert f"{directory} is as recorded, 6 files, 1.5 MB (hashed in" in capsys.readouterr().out


def test_a_dry_run_tells_everything_and_writes_nothing(hub, model, directory, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 5 * 10**11))
    model("--dry-run")
    assert not directory.parent.exists()
    assert hub.fetched() == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model zai-org/GLM-4.7-Flash, commit {hub.resolve(MODEL, 'main')}, into {directory}:"
    assert {line.split()[0] for line in lines[1:7]} == NEEDED
    assert f"  {SHARD}    1.0 MB  to fetch" in lines
    assert lines[7] == "6 files, 1.5 MB: 0 bytes there, 1.5 MB to fetch; 500.0 GB free on the disk"
    assert lines[8:] == ["dry run: nothing was fetched or written"]


def test_the_commit_stays_when_the_branch_moves_on(hub, model, directory):
    model()
    first = hub.resolve(MODEL, "main")
    hub.commit(MODEL, MODEL_FILES | {"config.json": b'{"new": true}', SHARD: b"new"})
    (directory / "config.json").unlink()
    hub.requests.clear()
    model()
    assert contents(directory) == {name: MODEL_FILES[name] for name in NEEDED}
    assert record(directory)["commit"] == first
    assert hub.fetched() == {"config.json": [None]}
    assert all(first in request.path for request in hub.requests)


def test_a_revision_that_is_another_commit_is_refused(hub, model, directory):
    model()
    first = hub.resolve(MODEL, "main")
    second = hub.commit(MODEL, MODEL_FILES | {"config.json": b'{"new": true}'})
    with pytest.raises(UserError, match=f"holds commit {first} .* revision main is commit {second}: choose another"):
        model("--revision", "main")
    assert contents(directory)["config.json"] == MODEL_FILES["config.json"]


def test_a_revision_can_be_asked_for(hub, model, directory):
    files = {"config.json": b"{}", "model.safetensors": b"old"}
    commit = hub.commit(MODEL, files, branch="v1")
    model("--revision", "v1")
    assert contents(directory) == files
    assert (record(directory)["revision"], record(directory)["commit"]) == ("v1", commit)
    model("--revision", "v1")


def test_the_former_name_is_the_same_model(hub, model, directory, capsys):
    model("--repo", "THUDM/GLM-4.7-Flash")
    assert "note: THUDM/GLM-4.7-Flash is the former name of zai-org/GLM-4.7-Flash" in capsys.readouterr().out
    assert record(directory)["repo"] == "zai-org/GLM-4.7-Flash"


def test_all_fetches_the_model_and_both_data_sets(hub, tmp_path):
    main(["all", "--base-dir", str(tmp_path / "base")])
    assert {path.name: set(contents(path)) for path in (tmp_path / "base").iterdir()} == {
        "GLM-4.7-Flash": NEEDED,
        "dapo-math-17k": {"dapo-math-17k.jsonl"},
        "aime-2024": {"aime-2024.jsonl"},
    }
    hub.requests.clear()
    main(["all", "--base-dir", str(tmp_path / "base")])
    assert hub.requests == []


def test_all_looks_at_everything_before_it_fetches(hub, tmp_path):
    hub.commit(DATA, {"train.csv": b""})
    with pytest.raises(UserError, match=r"dataset zhuzilin/aime-2024 has no file aime-2024\.jsonl"):
        main(["all", "--base-dir", str(tmp_path / "base")])
    assert hub.fetched() == {}


def test_another_data_set_is_all_its_jsonl_files(hub, directory):
    hub.commit("datasets/me/mine", {"a.jsonl": ROWS.encode(), "b.jsonl": ROWS.encode() * 2, "c.csv": b""})
    main(["data", "--repo", "me/mine", "--local-dir", str(directory)])
    assert {name: file["rows"] for name, file in record(directory)["files"].items()} == {"a.jsonl": 9, "b.jsonl": 18}


def test_an_empty_file_is_a_file(hub, model, directory):
    hub.commit(MODEL, MODEL_FILES | {"merges.txt": b""})
    model()
    assert (directory / "merges.txt").read_bytes() == b""
    assert record(directory)["files"]["merges.txt"]["bytes"] == 0


def test_files_that_another_tool_has_fetched_are_verified_and_taken_over(hub, model, directory):
    directory.mkdir(parents=True)
    for name in NEEDED - {SHARD}:
        (directory / name).write_bytes(MODEL_FILES[name])
    (directory / "notes.txt").write_text("mine")
    model()
    assert hub.fetched() == {SHARD: [None]}
    assert record(directory)["files"].keys() == NEEDED
    assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_file_that_is_not_the_hubs_is_neither_used_nor_overwritten(hub, model, directory, name):
    directory.mkdir(parents=True)
    (directory / name).write_bytes(bytes(len(MODEL_FILES[name])))
    with pytest.raises(
        UserError, match=rf"{name} is not that of the model zai-org/GLM-4\.7-Flash \(the hub says .*SHA-"
    ):
        model()
    assert contents(directory) == {name: bytes(len(MODEL_FILES[name]))}
    assert hub.fetched() == {}


@pytest.mark.parametrize("complete", [False, True])
def test_weights_that_the_repository_does_not_have_are_refused(hub, model, directory, complete):
    if complete:
        model()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "extra.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match=r"extra\.safetensors is no file of the model"):
        model()


def test_a_directory_of_another_repository_is_refused(hub, model, data, directory):
    data()
    with pytest.raises(
        UserError, match=r"holds the dataset zhuzilin/aime-2024: choose another directory for the model"
    ):
        model()


def test_a_file_in_place_of_the_directory_is_refused(hub, model, directory):
    directory.parent.mkdir()
    directory.touch()
    with pytest.raises(UserError, match="is no directory"):
        model()


def test_a_damaged_record_is_told(hub, model, directory):
    model()
    (directory / "download.json").write_text('{"repo": "zai-org')
    with pytest.raises(UserError, match=r"download\.json is damaged: restore it, or remove it"):
        model()
    (directory / "download.json").unlink()
    hub.requests.clear()
    model()
    assert hub.fetched() == {}
    assert record(directory)["files"].keys() == NEEDED


@pytest.mark.parametrize(("lacking", "pattern"), [("config.json", "config.json"), (".safetensors", "*.safetensors")])
def test_a_repository_without_weights_or_configuration_is_refused(hub, model, lacking, pattern):
    hub.commit(MODEL, {name: content for name, content in MODEL_FILES.items() if lacking not in name or "/" in name})
    with pytest.raises(UserError) as raised:
        model()
    assert f"has no file {pattern} at main" in str(raised.value)
    assert hub.fetched() == {}


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_model_that_has_changed_since_is_refused(hub, model, directory, name):
    model()
    content = bytearray(MODEL_FILES[name])
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    hub.requests.clear()
    with pytest.raises(UserError, match=f"{name} has changed since its download"):
        model()
    assert hub.requests == []
    (directory / name).unlink()
    model()
    assert contents(directory)[name] == MODEL_FILES[name]


def test_a_data_set_that_has_changed_since_is_told_with_rows_bytes_and_hashes(hub, data, directory):
    data()
    path = directory / "aime-2024.jsonl"
    kept = ROWS.encode()
    changed = b"".join(kept.splitlines(keepends=True)[:7])
    path.write_bytes(changed)
    with pytest.raises(UserError) as raised:
        data()
    assert str(raised.value) == (
        f"{path} has changed since its download: "
        f"recorded are 9 rows, {len(kept):,} bytes, SHA-256 {hashlib.sha256(kept).hexdigest()}; "
        f"found are 7 rows, {len(changed):,} bytes, SHA-256 {hashlib.sha256(changed).hexdigest()}; "
        f"remove it and run the same command to fetch it again, from commit {hub.resolve(DATA, 'main')[:12]}"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "1+1', "line 10: not valid JSON"),
        ("[]", "line 10: not a JSON object"),
        ('{"prompt": "1+1"}', "line 10: there is no field 'label' among 'prompt'"),
        ('{"question": "1+1", "label": "2"}', "line 10: there is no field 'prompt' among 'question', 'label'"),
    ],
)
def test_a_data_set_of_another_form_is_refused_with_file_and_line(hub, data, directory, line, problem):
    hub.commit(DATA, DATA_FILES | {"aime-2024.jsonl": f"{ROWS}{line}\n".encode()})
    for _ in range(2):
        with pytest.raises(UserError) as raised:
            data()
        assert f"aime-2024.jsonl, {problem}" in str(raised.value)
    assert "downloaded_at" not in record(directory)


def test_blank_lines_are_no_rows_and_a_file_without_rows_is_refused(hub, data, directory):
    hub.commit(DATA, {"aime-2024.jsonl": f"\n{ROWS}\n\n".encode()})
    data()
    assert record(directory)["files"]["aime-2024.jsonl"]["rows"] == 9
    shutil.rmtree(directory)
    hub.commit(DATA, {"aime-2024.jsonl": b"\n"})
    with pytest.raises(UserError, match="holds no rows"):
        data()


def test_every_finished_file_has_a_line(hub, model, capsys):
    model()
    lines = [line for line in capsys.readouterr().out.splitlines() if "is verified" in line]
    assert {line.split()[0] for line in lines} == NEEDED
    assert [line.split(", ")[1] for line in lines] == [f"{count} of 6 files" for count in range(1, 7)]
    assert lines[-1].split(", ")[2] == "1.5 MB of 1.5 MB"
