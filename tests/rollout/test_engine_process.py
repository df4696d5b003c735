"""An engine process is found healthy or told of in a sentence, listens locally only, and never stays behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from rollout_support import EngineUnderTest
from safetensors.torch import save_file

from recipe.config import Architecture, SglangConfig, resolve
from recipe.engines import launch
from recipe.engines.embedded.fused import FusedModel
from recipe.engines.launch import SERVE, Launch, SglangServer, launch_embedded, launch_sglang, sglang_python
from recipe.engines.process import EngineProcess, PortTaken
from recipe.system.errors import UserError

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVER
SHARING = (
    """
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=4096)
print("segment", segment._name, flush=True)
"""
    + SERVER
)
PARENT = """
import sys, time
from pathlib import Path
from recipe.engines.launch import Launch
from recipe.engines.process import EngineProcess
process = EngineProcess(Launch((sys.executable, "-c", sys.argv[1])), Path(sys.argv[2]))
process.wait_healthy(120)
print(process.pid, flush=True)
time.sleep(600)
"""


def _python(program: str) -> Launch:
    return Launch((sys.executable, "-c", program))


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _child_in(log: Path) -> int:
    return int(log.read_text().split("child ")[1].split()[0])


@pytest.mark.parametrize("program", [SERVER, STUBBORN])
def test_stop_ends_the_server_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr("recipe.engines.process.GRACE_S", 0.5)
    log = tmp_path / "log"
    bystander = subprocess.Popen(["sleep", "600"])
    process = EngineProcess(_python(program), log)
    process.wait_healthy(120)
    assert process.alive
    process.stop()
    process.stop()
    assert not process.alive
    assert not _alive(process.pid)
    deadline = time.monotonic() + 60
    while _alive(_child_in(log)):
        assert time.monotonic() < deadline
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_killed_servers_shared_memory_goes_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with EngineProcess(_python(SHARING), log) as process:
        process.wait_healthy(120)
        os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while process.alive:
            assert time.monotonic() < deadline
        segment = Path("/dev/shm") / log.read_text().split("segment /")[1].split()[0]
        assert segment.exists()
    assert not segment.exists()


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    process = EngineProcess(_python("import sys; print('first'); sys.exit('no such model')"), tmp_path / "log")
    with pytest.raises(UserError, match=r"ended with status 1; its log .*log says: no such model"):
        process.wait_healthy(120)


def test_a_server_that_never_becomes_healthy_is_told_and_ended(tmp_path: Path) -> None:
    process = EngineProcess(Launch(("sh", "-c", "echo thinking; sleep 600")), tmp_path / "log")
    with pytest.raises(UserError, match=r"never became healthy in 2 s; .* says: thinking"):
        process.wait_healthy(2)
    assert not process.alive


def test_a_bad_checkpoint_is_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").symlink_to(checkpoint / "config.json")
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    process = EngineProcess(launch_embedded(folder, weight_version="0", threads=1), tmp_path / "log")
    with pytest.raises(UserError, match="lacks"):
        process.wait_healthy(600)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_architecture_the_engine_cannot_run_is_refused(checkpoint: Path) -> None:
    architecture = Architecture.from_checkpoint(checkpoint)
    with pytest.raises(UserError, match="n_group = 2, topk_group = 3; use --rollout-engine sglang"):
        FusedModel(architecture.model_copy(update={"n_group": 2, "topk_group": 3}))


def test_a_server_dies_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, SERVER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert _alive(server)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while _alive(server):
        assert time.monotonic() < deadline
    os.kill(_child_in(tmp_path / "log"), signal.SIGKILL)


def test_the_engine_listens_on_the_loopback_only(engine: EngineUnderTest) -> None:
    server = psutil.Process(engine.process.pid)
    listening = [
        connection.laddr
        for process in (server, *server.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert engine.process.port in {port for _, port in listening}


@pytest.mark.parametrize("on_gpus", [True, False])
def test_sglangs_command_line_has_the_users_arguments_last(checkpoint: Path, on_gpus: bool) -> None:
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", sys.executable, "--colocate"]
    limits = ["--rollout-health-check-timeout", "45.5"]
    resolved = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags, *limits])
    sglang = SglangConfig(args={"mem_fraction_static": 0.5, "attention_backend": "triton", "disable_radix_cache": True})
    config = resolved.config.model_copy(update={"sglang": sglang})
    started = launch_sglang(
        Path("/model"),
        SglangServer.of(config, (2, 3) if on_gpus else ()),
        weight_version="7",
        threads=3,
        context_length=64,
        random_seed=5,
    )
    words = started.arguments
    assert words[0] == sys.executable
    assert words[-5:] == ("--mem-fraction-static", "0.5", "--attention-backend", "triton", "--disable-radix-cache")
    for name, value in {"weight-version": "7", "tp-size": "1", "context-length": "64", "dtype": "float32"}.items():
        assert words[words.index(f"--{name}") + 1] == value
    assert ("--enable-memory-saver" in words) == on_gpus
    assert ("cpu" in words) != on_gpus
    # Else SGLang's own limit, 20 s, would rule.
    assert started.environment["SGLANG_HEALTH_CHECK_TIMEOUT"] == "46"
    assert started.environment.get("OMP_NUM_THREADS") == (None if on_gpus else "3")
    assert started.environment.get("CUDA_VISIBLE_DEVICES") == ("2,3" if on_gpus else None)


def test_an_engine_on_a_trainers_gpus_has_the_cache_that_it_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is free when SGLang looks; and it does without a setting of torch's that its memory saver refuses."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    server = SglangServer(Path("python"), (0, 1), ("--mem-fraction-static", "0.7"), releases_memory=True)
    told = replace(server, cache_tokens=4096)
    for one in (server, told):
        launch = launch_sglang(checkpoint, one, weight_version="7", threads=1, context_length=64)
        assert launch.environment["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
        assert launch.environment["PYTORCH_ALLOC_CONF"] == ""
        words = list(launch.arguments)
        fractions = [words[place + 1] for place, word in enumerate(words) if word == "--mem-fraction-static"]
        assert fractions == (["0.7", "0.97"] if one is told else ["0.7"])
        assert ("--max-total-tokens" in words) == (one is told)
    assert words[words.index("--max-total-tokens") + 1] == "4096"


def test_an_engine_speculates_up_to_a_number_of_sequences(checkpoint: Path, tmp_path: Path) -> None:
    """By a file of SGLang's form, which lies in the server's own folder and goes with it."""
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", sys.executable, "--colocate"]
    config = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags]).config
    args = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 2}
    for limit, expected in ((None, {}), (32, {"1": {"candidate_steps": [2]}, "33": {"candidate_steps": [0]}})):
        sglang = SglangConfig(args=args, speculative_max_batch=limit)
        server = SglangServer.of(config.model_copy(update={"sglang": sglang}), gpus=(0,))
        assert server.speculation == expected
        assert not server.keeps_draft  # the tiny recipe trains the MTP layer
    started = launch_sglang(Path("/model"), server, weight_version="7", threads=1, context_length=64)
    assert "--speculative-adaptive" in started.arguments
    path = started.arguments[started.arguments.index("--speculative-adaptive-config") + 1]
    program = "import os, sys; print(os.environ['FOLDER']); sys.exit(open(sys.argv[1]).read())"
    environment = {"FOLDER": launch.SCRATCH}
    process = EngineProcess(Launch((sys.executable, "-c", program, path), environment, started.files), tmp_path / "log")
    with pytest.raises(UserError, match=r'says: {"1": {"candidate_steps": \[2\]}, "33": {"candidate_steps": \[0\]}}'):
        process.wait_healthy(120)
    assert not Path((tmp_path / "log").read_text().split()[0]).exists()


@pytest.mark.parametrize(("in_flight", "overlaps"), [(None, True), ("recompute", True), ("keep", False)])
def test_sglang_runs_no_batch_ahead_where_it_takes_weights_with_requests_in_place(
    checkpoint: Path, in_flight: str | None, overlaps: bool
) -> None:
    """Else the batch on the GPU would run into the new weights, and its tokens be told as theirs."""
    flags = ["--rollout-engine", "sglang", "--rollout-engine-python", sys.executable, "--rollout-num-gpus", "1"]
    asynchronous = ["--async-rollout", "--async-order", "finished"]
    flags += [] if in_flight is None else [*asynchronous, "--update-weight-in-flight", in_flight]
    config = resolve(["--recipe", "tiny", "--hf-checkpoint", str(checkpoint), *flags]).config
    server = SglangServer.of(config, gpus=(0,))
    started = launch_sglang(Path("/model"), server, weight_version="7", threads=1, context_length=64)
    assert ("--disable-overlap-schedule" not in started.arguments) is overlaps


def test_without_sglang_the_user_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_sglang_python", lambda named: None)
    with pytest.raises(UserError, match="`make install-sglang`"):
        sglang_python(None)


STUCK = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    answers = iter(ANSWERS)
    def do_GET(self):
        self.send_response(next(self.answers) if self.path == "/health_generate" else 200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(("answers", "generates"), [([503, 200], True), ([503, 503], False)])
def test_a_server_that_answers_and_does_not_generate_is_found_by_asking_twice(
    tmp_path: Path, answers: list[int], generates: bool
) -> None:
    with EngineProcess(_python(STUCK.replace("ANSWERS", str([200, *answers]))), tmp_path / "log") as process:
        process.wait_healthy(120)
        assert process.generates(60) is generates


CHILD_FAILS = """
print('''Traceback (most recent call last):
ValueError: was handled
[2026-11-23] Scheduler hit an exception: Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.OutOfMemoryError: 60 GiB are too much

Traceback (most recent call last):
EOFError
RuntimeError: Rank 0 scheduler died during initialization''')
raise SystemExit(1)
"""


def test_of_many_exceptions_the_one_that_began_it_is_told(tmp_path: Path) -> None:
    process = EngineProcess(_python(CHILD_FAILS), tmp_path / "log")
    with pytest.raises(UserError, match=r"ended with status 1; its log \S+ says: torch.OutOfMemoryError: 60") as error:
        process.wait_healthy(120)
    assert not isinstance(error.value, PortTaken)


@pytest.mark.parametrize(
    "words",
    [
        "ValueError: rpc_port at 39087 is not available in 30 seconds. rpc_port at 39087 is not available",
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use",
        "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:40001')",
        "torch.distributed.DistNetworkError: The server socket has failed to listen (port: 1, errno: -98, EADDRINUSE)",
    ],
)
def test_a_server_without_a_port_is_told_apart(tmp_path: Path, words: str) -> None:
    process = EngineProcess(_python(f"import sys; sys.exit({words!r})"), tmp_path / "log")
    with pytest.raises(PortTaken, match="says: ") as error:
        process.wait_healthy(120)
    assert str(error.value).endswith(words)


SGLANG_PARENT = """
import sys, time
from pathlib import Path
from recipe.engines.launch import USE_CPU, Launch
from recipe.engines.process import EngineProcess
print(EngineProcess(Launch(tuple(sys.argv[2:]), USE_CPU), Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


def _group(leader: int) -> set[int]:
    """The living processes of a group."""
    return {pid for pid in psutil.pids() if _alive(pid) and _group_of(pid) == leader}


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.sglang
@pytest.mark.slow
def test_sglang_that_loses_its_owner_while_it_starts_leaves_nothing(
    shared_sglang: EngineUnderTest, tmp_path: Path
) -> None:
    command = psutil.Process(shared_sglang.process.pid).cmdline()
    words = command[: command.index("--host")]
    owner = subprocess.Popen(
        [sys.executable, "-c", SGLANG_PARENT, str(tmp_path / "log"), *words], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    deadline = time.monotonic() + 600
    # The server, multiprocessing's tracker, scheduler and detokenizer.
    while len(_group(server)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # They have read what the server handed them, and import for some seconds before SGLang's own guard is up.
    time.sleep(2)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    while _group(server):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.sglang
def test_sglang_is_one_group_and_speaks_locally(shared_sglang: EngineUnderTest) -> None:
    server = psutil.Process(shared_sglang.process.pid)
    assert os.getpgid(server.pid) == server.pid
    assert all(os.getpgid(child.pid) == server.pid for child in server.children(recursive=True))
    [http] = [c for c in server.net_connections() if c.status == psutil.CONN_LISTEN]
    assert http.laddr.ip == "127.0.0.1"


@pytest.mark.sglang
def test_sglang_takes_the_processes_that_imported_beside_it(shared_sglang: EngineUnderTest) -> None:
    """It sets no variables besides those that are foreseen; its log would name them."""
    [log] = {Path(os.readlink(f"/proc/{shared_sglang.process.pid}/fd/1"))}
    assert "fired up" in log.read_text()
    assert "have changed" not in log.read_text()


@pytest.mark.sglang
def test_idle_sglang_leaves_the_cores_to_others(shared_sglang: EngineUnderTest) -> None:
    server = psutil.Process(shared_sglang.process.pid)
    processes = [server, *server.children(recursive=True)]

    def used_in_3_s() -> float:
        before = cpu_s()
        time.sleep(3)
        return cpu_s() - before

    def cpu_s() -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    assert any(used_in_3_s() < 1 for _ in range(10)), "though it has had time to end what it was asked before"


def test_sglang_does_not_import_the_trainers_library() -> None:
    """It would, for seconds in each of its processes, where it finds megatron, as in the image."""
    found = "import importlib.util as u; assert u.find_spec('megatron'); import serve; print(u.find_spec('megatron'))"
    where = os.environ | {"PYTHONPATH": str(SERVE.parent)}
    ended = subprocess.run([sys.executable, "-c", found], env=where, capture_output=True, text=True, check=False)
    assert ended.stdout == "None\n", ended.stderr
