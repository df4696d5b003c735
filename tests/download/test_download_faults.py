"""What happens when the network, the hub, the disk or the user does not play along."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import pytest
from hub_contents import MODEL, MODEL_FILES, NEEDED, ROWS, SHARD
from huggingface_hub import constants

from recipe.download.__main__ import main
from recipe.system.errors import UserError

TOKEN = "hf_secretSECRETsecret"
CONTENT = MODEL_FILES[SHARD]


def partial(directory):
    return directory / ".download" / f"{SHARD}.{hashlib.sha256(CONTENT).hexdigest()[:12]}"


def refusal(run, *flags):
    """The one sentence that the command ends with."""
    with pytest.raises(UserError) as raised:
        run(*flags)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def assert_complete(directory):
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "download.json"} == {
        name: MODEL_FILES[name] for name in NEEDED
    }
    assert "downloaded_at" in json.loads((directory / "download.json").read_text())


@pytest.mark.parametrize("reset", [False, True])
def test_a_file_goes_on_where_the_connection_was_lost(hub, model, directory, reset):
    hub.faults.cut_after[SHARD] = deque([300_000, 200_000])
    hub.faults.reset = reset
    model()
    assert hub.fetched()[SHARD] == [None, 300_000, 500_000]
    assert_complete(directory)


def test_a_download_that_is_given_up_goes_on_with_the_next_command(hub, model, directory, capsys):
    hub.faults.cut_after[SHARD] = deque([300_000, 0, 0, 0])
    text = refusal(model)
    assert f"{SHARD} of the model zai-org/GLM-4.7-Flash did not arrive after 3 retries (the connection to" in text
    assert text.endswith("what has arrived is kept, run the same command to go on")
    assert partial(directory).read_bytes() == CONTENT[:300_000]
    commit = json.loads((directory / "download.json").read_text())
    assert commit == {
        "repo": "zai-org/GLM-4.7-Flash",
        "repo_type": "model",
        "revision": "main",
        "commit": hub.resolve(MODEL, "main"),
        "files": {},
    }
    hub.commit(MODEL, dict.fromkeys(MODEL_FILES, b"of another commit"))
    hub.requests.clear()
    capsys.readouterr()
    model()
    assert hub.fetched() == {SHARD: [300_000]}
    assert_complete(directory)
    output = capsys.readouterr().out
    assert f"{SHARD}    1.0 MB  to fetch, but for 300.0 kB fetched earlier" in output
    assert "6 files, 1.5 MB: 812.1 kB there, 724.0 kB to fetch;" in output


def test_retries_that_bring_something_are_not_counted(hub, model, directory):
    hub.faults.cut_after[SHARD] = deque([0, 0, 100_000] * 6)
    model()
    assert_complete(directory)


def test_a_server_without_ranges_sends_the_file_anew(hub, model, directory):
    hub.faults.cut_after[SHARD] = deque([300_000])
    hub.faults.ranges = False
    model()
    assert hub.fetched()[SHARD] == [None, 300_000]
    assert_complete(directory)


@pytest.mark.parametrize("statuses", [[503], [429, 500, 502]])
def test_a_hub_that_is_busy_is_asked_again(hub, model, directory, statuses):
    hub.faults.statuses[SHARD] = deque(statuses)
    model()
    assert_complete(directory)


def test_a_hub_that_stays_busy_is_told(hub, model):
    hub.faults.statuses[SHARD] = deque([503] * 9)
    assert f"did not arrive after 3 retries ({hub.url} answers 503 Service Unavailable)" in refusal(model)


@pytest.mark.parametrize(
    ("name", "served", "problem"),
    [
        (SHARD, bytes(len(CONTENT)), f"the hub says SHA-256 {hashlib.sha256(CONTENT).hexdigest()}, found 7b331c02e3"),
        (SHARD, CONTENT + b"!", "the hub says 1,024,000 bytes, found 1,024,001"),
        ("config.json", b"[]", "the hub says git SHA-1 9e26dfeeb6e641a33dae4961196235bdb965b21b, found 0637a088a0"),
    ],
)
def test_a_file_that_is_not_what_the_hub_says_is_removed_and_fetched_again(
    hub, model, directory, name, served, problem
):
    hub.faults.served[name] = served
    text = refusal(model)
    assert f"{name} of the model zai-org/GLM-4.7-Flash arrived damaged ({problem}" in text
    assert text.endswith("and was removed: run the same command to fetch it again")
    assert not (directory / name).exists()
    assert not list((directory / ".download").glob(f"{name}*"))
    hub.faults.served.clear()
    hub.requests.clear()
    model()
    assert hub.fetched()[name] == [None]
    assert_complete(directory)


def test_a_file_that_is_shorter_on_the_server_is_told_and_does_not_spoil_the_next_attempt(hub, model, directory):
    hub.faults.served[SHARD] = bytes(300_000)
    assert f"{SHARD} of the model zai-org/GLM-4.7-Flash did not arrive" in refusal(model)
    hub.faults.served.clear()
    model()
    assert_complete(directory)


def test_files_are_fetched_side_by_side(hub, model, directory, capsys):
    hub.faults.stall_after[SHARD] = 600_000
    threading.Timer(0.5, hub.released.set).start()
    model()
    assert_complete(directory)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is verified" in line]
    assert lines[-1].startswith(SHARD)


def test_without_a_token_the_user_is_told_to_set_one(hub, model, directory):
    hub.faults.token = TOKEN
    assert refusal(model) == (
        f"{hub.url} does not show the model zai-org/GLM-4.7-Flash without a token (401): check the name, and if it is "
        "private or gated set HF_TOKEN to a token that can read zai-org/GLM-4.7-Flash"
    )
    assert not directory.exists()


def test_a_token_that_the_hub_refuses_is_told_by_where_it_came_from(hub, model, monkeypatch, tmp_path):
    hub.faults.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    advice = "(401): set HF_TOKEN to one that can read zai-org/GLM-4.7-Flash"
    assert refusal(model) == f"{hub.url} refuses the token in HF_TOKEN {advice}"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_other")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refusal(model) == f"{hub.url} refuses the token that was stored by `hf auth login` {advice}"


def test_the_token_goes_to_the_hub_only(hub, model, directory, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.token = TOKEN
    hub.faults.cdn = hub.url.replace("127.0.0.1", "localhost")
    hub.faults.cut_after[SHARD] = deque([300_000])
    model()
    assert_complete(directory)
    elsewhere = [request for request in hub.requests if request.host.startswith("localhost")]
    assert {request.file for request in elsewhere} == NEEDED
    assert {request.token for request in elsewhere} == {None}
    assert {request.token for request in hub.requests if request not in elsewhere} == {TOKEN}
    written = (directory / "download.json").read_text() + "".join(capsys.readouterr())
    assert TOKEN not in written + "".join(request.path for request in hub.requests)


def test_a_gated_repository_is_explained(hub, model, monkeypatch):
    hub.faults.gated = True
    page = f"{hub.url}/zai-org/GLM-4.7-Flash"
    head = f"the model zai-org/GLM-4.7-Flash is gated: accept its terms on {page}"
    assert refusal(model) == f"{head}, and set HF_TOKEN to that account's token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal(model) == f"{head} with the account of the token in HF_TOKEN"


def test_a_file_that_may_not_be_read_is_told(hub, data):
    hub.faults.statuses["aime-2024.jsonl"] = deque([403])
    assert refusal(data) == (
        f"{hub.url} forbids reading the dataset zhuzilin/aime-2024 with no token (403): set HF_TOKEN to one that can "
        f"read zhuzilin/aime-2024, and accept the terms on {hub.url}/datasets/zhuzilin/aime-2024 if there are any"
    )


def test_what_the_hub_does_not_have_is_told(hub, model):
    assert refusal(model, "--repo", "zai-org/GLM-5") == (
        f"there is no model zai-org/GLM-5 on {hub.url} that you can read (404): check the name and HF_TOKEN"
    )
    assert refusal(model, "--revision", "v9") == f"the model zai-org/GLM-4.7-Flash has no revision v9 on {hub.url}"
    assert refusal(model, "--repo", "GLM 5") == "'GLM 5' is no repository's name: give ORGANISATION/NAME"


def test_a_file_that_is_listed_but_not_there_is_told(hub, model):
    hub.faults.missing.add("config.json")
    commit = hub.resolve(MODEL, "main")
    assert refusal(model) == f"the model zai-org/GLM-4.7-Flash has no file config.json at {commit} on {hub.url}"


def test_an_answer_that_is_no_hubs_is_told(hub, model):
    hub.faults.gibberish = True
    assert refusal(model) == f"{hub.url} does not answer as a hub does: check HF_ENDPOINT"


def test_a_hub_that_cannot_be_reached_is_named(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    text = refusal(model)
    assert text.startswith("the connection to http://127.0.0.1:1 failed (")
    assert text.endswith("): check the network and HF_ENDPOINT, or try again later")


def test_a_server_that_the_hub_redirects_to_is_named(hub, model):
    hub.faults.cdn = "http://localhost:1"
    assert f"(the connection to localhost, to which {hub.url} redirects, failed (" in refusal(model)


def test_offline_a_complete_copy_is_enough(hub, model, directory, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(model).endswith("has to be fetched, but HF_HUB_OFFLINE is set: unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    model()
    assert hub.requests == []


def test_a_disk_that_fills_up_is_told_with_what_is_missing(hub, model, directory):
    partial(directory).parent.mkdir(parents=True)
    partial(directory).symlink_to("/dev/full")
    text = refusal(model)
    assert text.startswith(f"the disk of {directory} is full, and ")
    assert int(text.split(" bytes are still")[0].split()[-1].replace(",", "")) >= len(CONTENT)
    partial(directory).unlink()
    model()
    assert_complete(directory)


def with_free_space(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(hub, model, directory, monkeypatch, flags):
    needed = sum(len(MODEL_FILES[name]) for name in NEEDED)
    with_free_space(monkeypatch, needed - 1)
    assert refusal(model, *flags) == (
        f"{needed:,} bytes are to be fetched into {directory}, but only {needed - 1:,} bytes are free there: "
        "free 1 bytes more, or choose another disk"
    )
    assert not directory.parent.exists()
    assert hub.fetched() == {}


def test_only_what_is_still_missing_has_to_fit_on_the_disk(hub, model, directory, monkeypatch):
    hub.faults.cut_after[SHARD] = deque([300_000, 0, 0, 0])
    refusal(model)
    with_free_space(monkeypatch, len(CONTENT) - 300_000)
    model()
    assert_complete(directory)


def test_all_has_to_fit_together(hub, tmp_path, monkeypatch):
    with_free_space(monkeypatch, sum(len(MODEL_FILES[name]) for name in NEEDED) + len(ROWS))
    text = refusal(lambda: main(["all", "--base-dir", str(tmp_path / "base")]))
    assert f"GLM-4.7-Flash and {tmp_path}/base/dapo-math-17k and {tmp_path}/base/aime-2024, but only" in text
    assert f"free {2 * len(ROWS):,} bytes more" in text


def test_a_directory_that_cannot_be_made_is_told(hub, tmp_path):
    (tmp_path / "file").touch()
    text = refusal(lambda: main(["data", "aime-2024", "--local-dir", str(tmp_path / "file" / "copy")]))
    assert text.startswith(f"{tmp_path}/file/copy cannot be written: ")


def test_two_downloads_do_not_meet_in_a_directory(hub, model, directory):
    (directory / ".download").mkdir(parents=True)
    with (directory / ".download" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refusal(model) == f"another download is at work in {directory}: wait until it has ended"
    model()
    assert_complete(directory)


def command(hub, tmp_path, *arguments):
    """The command as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DOWNLOAD_TIMEOUT": "600",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }
    words = [sys.executable, "-m", "recipe.download", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_the_next_command_goes_on(hub, model, directory, tmp_path, number):
    hub.faults.stall_after[SHARD] = 300_000
    process = command(hub, tmp_path, "model", "--local-dir", directory)
    deadline = time.monotonic() + 240
    while not (partial(directory).exists() and partial(directory).stat().st_size >= 250_000):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (128 + number, f"stopping: {number.name} received\n")
    kept = partial(directory).read_bytes()
    assert len(kept) >= 250_000
    assert CONTENT.startswith(kept)
    hub.faults.stall_after.clear()
    hub.requests.clear()
    model()
    assert hub.fetched()[SHARD] == [len(kept)]
    assert_complete(directory)


def test_the_command_ends_with_one_sentence_and_without_the_token(hub, directory, tmp_path):
    hub.faults.token = "hf_other"
    process = command(hub, tmp_path, "data", "aime-2024", "--local-dir", directory)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith(f"error: {hub.url} refuses the token in HF_TOKEN (401)")
    assert errors.count("\n") == 1
    assert TOKEN not in errors


@pytest.mark.parametrize("arguments", [["data"], ["data", "gsm8k"], ["data", "aime-2024", "--repo", "me/mine"], []])
def test_what_to_download_has_to_be_said(arguments):
    with pytest.raises(SystemExit) as raised:
        main([*arguments, "--local-dir", "x"])
    assert raised.value.code == 2
