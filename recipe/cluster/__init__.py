"""Everything that imports ray: starting it, placing the trainer's ranks and the engines, and speaking to them.

Ray opens ports on every address whatever it is told, so it always runs with token authentication; it takes note of that
when it is imported. Failed calls whose results nobody asks for follow one that was told: Ray need not tell them too.
Every process sees all GPUs of its machine and is told which are its own: an engine may have more than Ray knows of.
"""

import os

os.environ |= {
    "RAY_AUTH_MODE": "token",
    # Ports of its metrics would answer anybody, on every address. Two have no switch: they are given none.
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
    # A worker that ends would kill its children: torch's watcher has shared memory to remove first.
    "RAY_kill_child_processes_on_worker_exit": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}

from recipe.cluster.engine_group import EngineGroup
from recipe.cluster.placement import place
from recipe.cluster.ray_session import ray_session
from recipe.cluster.trainer_group import TrainerGroup

__all__ = ["EngineGroup", "TrainerGroup", "place", "ray_session"]
