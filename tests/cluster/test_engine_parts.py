"""An engine over two machines starts, ends and is replaced as one. (Both machines are this one.)"""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, re, signal, sys, time
from pathlib import Path
from recipe.cluster.rendezvous import write_token
from recipe.cluster.ray_node import LOOPBACK, TOKEN_PATH
from recipe.cluster.engine_actor import EngineActor
from recipe.plan.constants import LEAST_OBJECT_STORE
from recipe.cluster.placement import Seat
from recipe.config import Architecture, Config, Resolved
from recipe.system.errors import UserError
from recipe.weights.tiny import write_tiny_checkpoint
import psutil
import ray

folder, interpreter = Path(sys.argv[1]), sys.argv[2]
write_tiny_checkpoint(folder / "hf", seed=1)
config = Config.model_validate({
    "model": {"hf_checkpoint": folder / "hf"}, "data": {"prompt_data": folder / "prompts"},
    "rollout": {
        "engine": "sglang", "num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4,
        "rollout_engine_python": interpreter, "rollout_health_check_timeout": 5,
    },
    "optimizer": {"lr": 1e-3}, "sglang": {"rollout_num_gpus_per_engine": 2}, "misc": {"runs_dir": folder},
    "cluster": {"rollout_num_gpus": 2},
})
resolved = Resolved(config, Architecture.from_checkpoint(folder / "hf"), {}, ())
write_token(folder / "token")
os.environ[TOKEN_PATH] = str(folder / "token")
options = {"include_dashboard": False, "log_to_driver": False, "_node_ip_address": LOOPBACK}
ray.init(address="local", num_cpus=2, object_store_memory=LEAST_OBJECT_STORE, **options)
engine = EngineActor(resolved, 0, (), [Seat({"num_cpus": 0}, ())])

def nodes():
    \"\"\"Of the last start: process ids by node rank, which are alive.\"\"\"
    newest = {}
    for log in sorted((config.run_dir / "logs").iterdir(), key=lambda log: log.stat().st_mtime):
        for rank, pid in re.findall(r"node (\\d) of 2 is (\\d+)", log.read_text()):
            newest[int(rank)] = int(pid)
    return [newest[rank] for rank in (0, 1)]

def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)

url = engine.start()
first = nodes()
assert engine.works() and nodes() == first
os.kill(first[1], signal.SIGKILL)
wait_until(lambda: not engine.nodes.are_alive())
assert not engine.works() and engine.start() != url
second = nodes()
assert not set(first) & set(second)
wait_until(lambda: gone(first))
part = psutil.Process(second[1]).parent()
assert "EngineNodeActor" in " ".join(part.cmdline())
part.kill()
wait_until(lambda: not engine.nodes.are_alive())
url = engine.start()
third = nodes()
assert not set(second) & set(third)
wait_until(lambda: gone(second))
os.kill(third[0], signal.SIGKILL)
wait_until(lambda: not engine.process.alive)
assert not engine.works() and engine.start() != url
fourth = nodes()
assert not set(third) & set(fourth)
wait_until(lambda: gone(third))
(folder / "hf" / "node-1-fails").touch()
try:
    engine.start()
except UserError as error:
    print(error)
wait_until(lambda: gone(fourth))
assert engine.nodes.are_alive()  # there are none
(folder / "hf" / "node-1-fails").unlink()
engine.start()
engine.stop()
wait_until(lambda: gone(nodes()))
ray.shutdown()
"""


def test_the_parts_of_an_engine_share_its_fate(tmp_path: Path) -> None:
    """In a process of its own: Ray reads one token for as long as a process lives."""
    interpreter = tmp_path / "python"
    # It is given serve.py and SGLang's arguments.
    stub = Path(__file__).with_name("stub_sglang.py")
    interpreter.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {stub} "$@"\n')
    interpreter.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(interpreter)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    told = result.stdout.splitlines()[-1]
    assert "engine-0-node-1" in told
    assert told.endswith("says: ValueError: no room on this machine")
