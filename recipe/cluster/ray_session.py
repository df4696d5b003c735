"""Ray, started for one run and ended with it.

The run's token is fresh and lies in a file that only this user can read. The file's name reaches Ray's processes by
environment; the token is on no command line.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from recipe.cluster.ray_node import LOOPBACK, RAY, RAY_LOGS, TOKEN_PATH, logs_kept
from recipe.cluster.ray_processes import VITAL, RayProcesses
from recipe.cluster.rendezvous import check_own_address, write_token
from recipe.config import Config
from recipe.config.engine_placement import gpus_of_fullest_machine
from recipe.system.environment import handed_on
from recipe.system.errors import UserError
from recipe.system.scratch import scratch_folder

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 2
_TIMED_OUT = "timed out during startup"
"""What Ray says when a node is not there in time, in an exception that is of no class of its own."""


@contextmanager
def ray_session(config: Config, object_store: int) -> Iterator[None]:
    """Ray for this run: the cluster that submitted this job if there is one (RAY_ADDRESS), or a local one of our own,
    with an `object_store` of so many bytes, whose processes end with this block and die with this process. The block
    ends with a UserError if one of them dies that it needs."""
    if "RAY_ADDRESS" in os.environ:
        try:
            with _own_signals():
                _join_cluster(config)
            yield
        finally:
            ray.shutdown()
        return
    if config.cluster.master_addr is not None:
        check_own_address(config.cluster.master_addr)
    with scratch_folder() as scratch, RayProcesses(scratch) as processes:
        try:
            write_token(scratch / "token")
            os.environ |= {TOKEN_PATH: str(scratch / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
            with logs_kept(scratch, config.run_dir):
                _start_local(config, scratch, object_store, processes)
                with processes.watched(VITAL):
                    yield
        finally:
            ray.shutdown()
            os.environ.pop(TOKEN_PATH, None)


def _join_cluster(config: Config) -> None:
    try:
        ray.init(log_to_driver=True, logging_level=_level(config))
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"no Ray cluster can be joined at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({reason}): unset RAY_ADDRESS, "
            "and the run starts its own"
        ) from error


def _start_local(config: Config, scratch: Path, object_store: int, processes: RayProcesses) -> None:
    """Starts Ray, again if need be: it picks some ports well before it opens them, and somebody else may be faster. Of
    a start that fails Ray leaves the processes that came up; they end before the next one."""
    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            _init_local(config, scratch, object_store)
            return
        except Exception as error:
            timed_out = type(error) is Exception and _TIMED_OUT in str(error)
            if not timed_out and not isinstance(error, OSError | RuntimeError):
                raise
            ray.shutdown()
            processes.end_started()
            if attempt == _START_ATTEMPTS:
                raise UserError(
                    f"Ray does not start on this machine ({error}): see its logs in {config.run_dir / RAY_LOGS}; the "
                    f"commonest causes are a full {scratch.parent} and a small /dev/shm"
                ) from error
            logger.warning("Ray did not start (%s): starting it again", error)


def _init_local(config: Config, scratch: Path, object_store: int) -> None:
    slots = gpus_of_fullest_machine(config)
    with _own_signals():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, slots),
            include_dashboard=False,
            object_store_memory=object_store,
            log_to_driver=True,
            logging_level=_level(config),
            _node_ip_address=LOOPBACK,
            _temp_dir=str(scratch / RAY),
        )


def _level(config: Config) -> int:
    return logging.getLevelNamesMapping()[config.misc.log_level.upper()]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Leaves the program its answer to SIGTERM, which `ray.init` replaces by one of its own, and Ray's core by one that
    aborts: a signal that comes meanwhile is answered afterwards. What Ray starts has sessions of its own: signals to
    the program's process group, as `timeout`, Slurm and terminals send them, are the program's to answer, and it needs
    Ray to save."""
    answer = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with mock.patch.object(ray._private.services, "ConsolePopen", _open_in_session):
            yield
    finally:
        signal.signal(signal.SIGTERM, answer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _open_in_session(command: Sequence[str], preexec_fn: Callable[[], None], **named: Any) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        preexec_fn()

    named["env"] = handed_on(named["env"], to_ray=True)
    return subprocess.Popen(command, preexec_fn=prepare, start_new_session=True, **named)
