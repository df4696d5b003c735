"""Starts Ray on this machine, waits for the others, and trains as a job of Ray's: python -m recipe.cluster.launch FLAGS

FLAGS are those of recipe.train. With several nodes (--actor-num-nodes) this one is the head: --master-addr is its
address, BASE_DIR the storage that all nodes share, and each other node runs `python -m recipe.cluster.join`. The job's
output is followed, and its exit status returned. SIGTERM here, or on a node that has joined, lets the run save and end.
"""

import asyncio
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from recipe.cluster.ray_node import (
    DASHBOARD_PORT,
    GCS_PORT,
    LOOPBACK,
    TOKEN_PATH,
    NodeSize,
    RayNode,
    keep_logs,
    logs_kept,
)
from recipe.cluster.ray_processes import VITAL_TO_RAY_START, RayProcesses
from recipe.cluster.rendezvous import POLL_S, HeadCard, NodeRendezvous, check_own_address
from recipe.config import Config, resolve
from recipe.config.engine_placement import gpus_of_fullest_machine
from recipe.config.usage import CHECK, FORCE
from recipe.engines.argument_check import check_arguments
from recipe.plan.memory import object_store_bytes
from recipe.system.environment import keep_back
from recipe.system.errors import UserError, run_main
from recipe.system.ports import reserve_port
from recipe.system.scratch import scratch_folder
from recipe.system.shutdown import SAVED_STATUS, STOPPED_STATUS

ROOT = Path(__file__).parents[2]
JOIN_TIMEOUT_S = 1800
"""Longest wait for the other nodes: images are pulled meanwhile."""
AGENT_TIMEOUT_S = 300
"""Longest wait for Ray's agent on this node, which reads its packages from the disk first."""
_NO_AGENT = "No available agent"
FAILED_STATUS = 1
"""Where the job has left no status of its own."""


def main() -> int:
    flags = sys.argv[1:]
    command = [sys.executable, "-m", "recipe.train", *flags]
    resolved = resolve([flag for flag in flags if flag not in (CHECK, FORCE)])
    if CHECK in flags:
        check_arguments(resolved)
        print(resolved.describe())
        return 0
    config = resolved.config
    address, several = _head_address(config), config.cluster.actor_num_nodes > 1
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        rendezvous = NodeRendezvous(_base_dir() if several else scratch)
        rendezvous.open()
        stack.callback(rendezvous.close)
        slots = max(os.cpu_count() or 1, gpus_of_fullest_machine(config))
        size = NodeSize(slots, object_store_bytes(resolved))
        processes = stack.enter_context(RayProcesses(scratch))
        port, dashboard_port = (GCS_PORT, DASHBOARD_PORT) if several else _free_ports()
        own = None if several else (scratch, config.run_dir)
        if own is not None:
            stack.enter_context(logs_kept(*own))
        stack.enter_context(RayNode.head(address, rendezvous.token, size, port, dashboard_port, own))
        stack.enter_context(processes.watched(VITAL_TO_RAY_START))
        os.environ |= {TOKEN_PATH: str(rendezvous.token)}
        if several:
            card = rendezvous.announce(address, port, size.object_store)
            wait_for_nodes(rendezvous, card, config.cluster.actor_num_nodes)
        keep_back(os.environ, kept := scratch / "environment")
        status = asyncio.run(Job(command, kept, rendezvous, f"http://{LOOPBACK}:{dashboard_port}").run())
        if own is not None and status not in (0, SAVED_STATUS, STOPPED_STATUS):
            keep_logs(*own)
        return status


def _head_address(config: Config) -> str:
    if config.cluster.actor_num_nodes == 1:
        return LOOPBACK
    address = config.cluster.master_addr
    if address is None:
        raise UserError(
            f"--master-addr is not set: with {config.cluster.actor_num_nodes} nodes it must be this machine's address, "
            "as the others reach it (MASTER_ADDR, for the scripts)"
        )
    check_own_address(address)
    return address


def _free_ports() -> tuple[int, int]:
    with reserve_port() as one, reserve_port() as another:
        return one.getsockname()[1], another.getsockname()[1]


def _base_dir() -> Path:
    folder = Path(os.environ.get("BASE_DIR", ""))
    if not folder.is_absolute() or not folder.is_dir():
        raise UserError(f"BASE_DIR={str(folder)!r} must be an absolute path to storage that all nodes share")
    return folder


def wait_for_nodes(rendezvous: NodeRendezvous, card: HeadCard, count: int) -> None:
    """Returns when `count` nodes, this one among them, belong to the cluster. Raises UserError if they do not come, or
    one of them has left no card in BASE_DIR."""
    print(
        f"waiting for {count - 1} more of {count} nodes; on each: "
        f"MASTER_ADDR={card.address} BASE_DIR={rendezvous.folder.parent} make join",
        flush=True,
    )
    ray.init(address=f"{card.address}:{card.port}", log_to_driver=False, configure_logging=False)
    try:
        deadline, known = time.monotonic() + JOIN_TIMEOUT_S, {card.address}
        while len(known) < count:
            if time.monotonic() > deadline:
                raise UserError(
                    f"only {len(known)} of {count} nodes have come in {JOIN_TIMEOUT_S} s: {', '.join(sorted(known))}"
                )
            time.sleep(POLL_S)
            alive = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            for address in sorted(alive - known):
                print(f"{address} has joined", flush=True)
            known |= alive
        if strangers := known - {card.address} - rendezvous.introduced(card):
            raise UserError(
                f"{', '.join(sorted(strangers))} joined, but left no card in {rendezvous.folder}: BASE_DIR must be the "
                "same storage on every node"
            )
    finally:
        ray.shutdown()


class Job:
    """The run, as a job of the cluster whose dashboard is at `url`. `kept` is the file of what Ray does without."""

    def __init__(self, command: list[str], kept: Path, rendezvous: NodeRendezvous, url: str) -> None:
        self._kept = kept
        self._command, self._rendezvous, self._url = command, rendezvous, url
        self._id = ""

    async def run(self) -> int:
        """Submits the job and follows its output. Returns its exit status."""
        loop = asyncio.get_running_loop()
        self._client = JobSubmissionClient(self._url)
        words = [sys.executable, "-m", "recipe.system.environment", str(self._kept), *self._command]
        entrypoint = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(words)}"
        print(f"+ ray job submit --address {self._url} -- {shlex.join(self._command)}", flush=True)
        self._id = await self._submit(entrypoint)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._pass_on, number)
        notices = asyncio.create_task(self._heed_notices())
        try:
            async for lines in self._client.tail_job_logs(self._id):
                print(lines, end="", flush=True)
            return await self._exit_status()
        finally:
            notices.cancel()

    async def _submit(self, entrypoint: str) -> str:
        """Ray says that it has started before its agents have, one of which is to start the job."""
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                return str(self._client.submit_job(entrypoint=entrypoint))
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(f"Ray's agent does not start in {AGENT_TIMEOUT_S} s: {error}") from error
            await asyncio.sleep(POLL_S)

    async def _exit_status(self) -> int:
        info = self._client.get_job_info(self._id)
        while not info.status.is_terminal():
            await asyncio.sleep(POLL_S)
            info = self._client.get_job_info(self._id)
        status = info.driver_exit_code
        if status is None:
            status = 0 if info.status == JobStatus.SUCCEEDED else FAILED_STATUS
            if status:
                reason, *_ = (info.message or "for no reason that Ray tells").splitlines()
                print(f"error: the job ended without a status: {reason}", file=sys.stderr)
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: signal.Signals) -> None:
        """To the run itself: Ray's own way of stopping a job leaves it three seconds and ends its children with it."""
        info = self._client.get_job_info(self._id).driver_info
        if info is None or not info.pid:
            self._client.stop_job(self._id)
            return
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(info.pid)).send_signal(number)

    async def _heed_notices(self) -> None:
        leaving: list[str] = []
        while not leaving:
            await asyncio.sleep(POLL_S)
            leaving = self._rendezvous.notices()
        print(f"{', '.join(leaving)} will be taken away", file=sys.stderr, flush=True)
        self._pass_on(signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)
