"""The server of `make watch`: for this machine alone, and no way to anything but the runs."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest
from made_up_run import write_run

ROOT = Path(__file__).parents[2]


@contextmanager
def watching(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The server of a folder, and its address."""
    command = [sys.executable, "-m", "recipe.run.watch", str(folder), *(flags or ("--port", "0"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "http://127.0.0.1:" in first, first
        yield process, first.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "one", 3, 8)
    write_run(folder / "two", 2, 8)
    (folder / "secret.txt").write_text("not for the page")
    (folder / "no-run").mkdir()
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with watching(runs) as (_, url):
        yield url


async def get(url: str, **named: object) -> tuple[int, object, dict]:
    async with aiohttp.ClientSession() as session, session.get(url, **named) as answer:
        body = await (answer.json() if answer.content_type == "application/json" else answer.text())
        return answer.status, body, dict(answer.headers)


async def test_the_runs_and_nothing_else_are_listed(address: str, runs: Path) -> None:
    _, body, _ = await get(f"{address}api/runs")
    assert body["folder"] == str(runs)
    assert {run["name"] for run in body["runs"]} == {"one", "two"}
    assert {run["state"] for run in body["runs"]} == {"finished"}


async def test_one_run_alone(runs: Path) -> None:
    with watching(runs / "two") as (_, url):
        assert [run["name"] for run in (await get(f"{url}api/runs"))[1]["runs"]] == ["two"]
        assert (await get(f"{url}api/run/one/head"))[0] == 404


@pytest.mark.parametrize("name", ["no-run", "nothing", "..", "%2e%2e", "..%2fone", "%2Fetc", "one%2f..%2fsecret.txt"])
async def test_a_name_that_is_no_run_is_a_sentence(address: str, name: str) -> None:
    from yarl import URL

    status, body, _ = await get(URL(f"{address}api/run/{name}/head", encoded=True))
    assert status == 404
    assert "not for the page" not in str(body)


@pytest.mark.parametrize("path", ["../server.py", "%2e%2e/server.py", "../../status.py", "/etc/passwd"])
async def test_files_outside_the_page_are_not_served(address: str, path: str) -> None:
    from yarl import URL

    assert (await get(URL(address + path, encoded=True)))[0] in (403, 404)


async def test_no_other_page_may_ask(address: str) -> None:
    """A page from elsewhere whose name was made to mean this machine."""
    assert (await get(f"{address}api/runs", headers={"Host": "evil.example"}))[0] == 403
    assert (await get(f"{address}api/runs", headers={"Host": "localhost:1"}))[0] == 200


async def test_what_the_page_may_load_is_said_with_every_answer(address: str) -> None:
    for path in ("", "api/runs", "main.js", "api/run/nothing/head"):
        headers = (await get(address + path))[2]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'"), path
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("query", ["metrics?after=much", "samples?min_reward=x", "sample?rollout=-1&line=0"])
async def test_nonsense_is_a_sentence(address: str, query: str) -> None:
    status, body, _ = await get(f"{address}api/run/one/{query}")
    assert status == 404
    assert re.search("is no number|is not understood", body["error"])


async def test_it_listens_on_this_machine_alone_and_ends_when_told(runs: Path) -> None:
    with watching(runs) as (process, _):
        listening = [one for one in psutil.Process(process.pid).net_connections("inet") if one.status == "LISTEN"]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_it_says_how_it_is_reached_from_elsewhere(runs: Path) -> None:
    with watching(runs) as (process, url):
        port = url.rstrip("/").rpartition(":")[2]
        assert process.stdout is not None
        assert f"ssh -L {port}:127.0.0.1:{port} " in process.stdout.readline()


def test_bad_starts_are_a_sentence(runs: Path, tmp_path: Path) -> None:
    def ended(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipe.run.watch", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            "is taken: give another --port": (str(runs), "--port", port),
            "is no folder": (str(tmp_path / "nothing"),),
            "is no port": (str(runs), "--port", "70000"),
        }
        for sentence, words in cases.items():
            found = ended(*words)
            assert found.returncode == 2, words
            assert sentence in found.stderr
            assert "Traceback" not in found.stderr


def touched(folder: Path) -> dict[Path, int]:
    """When everything in a folder was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


async def test_nothing_is_written(runs: Path) -> None:
    before = touched(runs)
    with watching(runs) as (_, url):
        for path in (
            "api/runs",
            "api/run/one/head",
            "api/run/one/metrics",
            "api/run/one/samples",
            "api/run/one/timeline",
        ):
            assert (await get(url + path))[0] == 200
    assert touched(runs) == before
