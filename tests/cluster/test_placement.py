"""Which GPUs the processes of a run get, on a machine that says it has four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from recipe.cluster import placement
from recipe.cluster.placement import nccl_settings, uses_gpus
from recipe.cluster.trainer_group import threads_per_rank
from recipe.config import Config

PROGRAM = """
import os, sys
from pathlib import Path
from recipe.cluster.rendezvous import write_token
from recipe.cluster.ray_node import LOOPBACK, TOKEN_PATH
from recipe.plan.constants import LEAST_OBJECT_STORE
from recipe.cluster.placement import place
from recipe.config import Config
import ray
from ray.util.placement_group import remove_placement_group

def config_of(**cluster):
    rollout = {"engine": "sglang", "num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4}
    return Config.model_validate({
        "model": {"hf_checkpoint": "hf"}, "data": {"prompt_data": "prompts"}, "rollout": rollout,
        "optimizer": {"lr": 1e-3}, "sglang": {"rollout_num_gpus_per_engine": 2}, "cluster": cluster,
    })

write_token(Path(sys.argv[1]))
os.environ[TOKEN_PATH] = sys.argv[1]
options = {"include_dashboard": False, "log_to_driver": False, "_node_ip_address": LOOPBACK}
ray.init(address="local", num_cpus=4, num_gpus=4, object_store_memory=LEAST_OBJECT_STORE, **options)
shared = place(config_of(actor_num_gpus_per_node=4, colocate=True))
print([[seat.gpus for seat in shared.seats(engine)] for engine in range(2)])
remove_placement_group(shared.group)
apart = place(config_of(actor_num_gpus_per_node=2, rollout_num_gpus=2))
print([seat.gpus for seat in apart.seats(0)])
ray.shutdown()
"""


def test_an_engine_sees_all_its_gpus_and_no_others(tmp_path: Path) -> None:
    """In a process of its own: Ray reads one token for as long as a process lives."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "token")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[[(0, 1)], [(2, 3)]]", "[(2, 3)]"]


def test_gpus_that_ray_was_not_told_of_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a run is refused when it asks Ray for them. On the CPU it would take weeks."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    rollout = {"num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4}
    config = Config.model_validate(
        {
            "model": {"hf_checkpoint": "hf"},
            "data": {"prompt_data": "prompts"},
            "rollout": rollout,
            "optimizer": {"lr": 1e-3},
        }
    )
    for there in (True, False):
        monkeypatch.setattr(placement, "read_gpus", lambda there=there: (object(),) * there)
        assert uses_gpus(config) is there


def run_of(engine: str, transfer: str | None = None, **cluster: object) -> Config:
    rollout = {"engine": engine, "num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 4}
    return Config.model_validate(
        {
            "model": {"hf_checkpoint": "hf"},
            "data": {"prompt_data": "prompts"},
            "rollout": rollout | {"update_weight_transfer": transfer},
            "optimizer": {"lr": 1e-3},
            "cluster": {"actor_num_gpus_per_node": 2, **cluster},
        }
    )


def test_nccl_is_as_sglang_has_it_where_they_form_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first weights end the engines' GPUs' group with "invalid argument"."""
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    apart = run_of("sglang", rollout_num_gpus=2)
    assert nccl_settings(apart) == {"NCCL_CUMEM_ENABLE": "0"}
    assert nccl_settings(run_of("sglang", colocate=True)) == {}
    assert nccl_settings(run_of("sglang", "disk", rollout_num_gpus=2)) == {}
    assert nccl_settings(run_of("embedded")) == {}
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert nccl_settings(apart) == {}, "SGLang's processes have what the user has set"


def test_ranks_leave_cores_to_processes_that_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that shares its core with one of SGLang's would make CPU Adam take twice as long."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert threads_per_rank(run_of("embedded")) == 16
    assert 2 * threads_per_rank(run_of("sglang", colocate=True)) <= 32 - 3, "two schedulers and a controller poll"
    assert threads_per_rank(run_of("sglang", colocate=True, num_cpus_per_rank=16)) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert threads_per_rank(run_of("sglang", colocate=True)) == 1
