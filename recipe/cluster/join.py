"""Joins this machine to the cluster of a run: MASTER_ADDR=HEAD BASE_DIR=SHARED python -m recipe.cluster.join

Waits for the head, checks that it can be reached, that BASE_DIR is the same storage and that both run the same
software, and stays until the run ends. NODE_ADDR chooses among this machine's addresses; by default it is the one on
the way to the head. A SIGTERM tells the head that this machine will be taken away.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from recipe.cluster.ray_node import NodeSize, RayNode
from recipe.cluster.rendezvous import POLL_S, NodeRendezvous, check_reachable
from recipe.system.errors import UserError, run_main
from recipe.system.scratch import scratch_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-timeout-s", type=float, default=600, help="longest wait for the head")
    arguments = parser.parse_args()
    master_addr, base_dir = _told("MASTER_ADDR"), Path(_told("BASE_DIR"))
    rendezvous = NodeRendezvous(base_dir)
    card = rendezvous.wait_for_head(master_addr, arguments.head_timeout_s)
    address = os.environ.get("NODE_ADDR") or check_reachable(card.address, card.port)
    rendezvous.introduce(address, card)
    size = NodeSize(os.cpu_count() or 1, card.object_store)
    worker = (address, f"{card.address}:{card.port}", rendezvous.token, size)
    with scratch_folder(), RayNode.worker(*worker) as node:
        print(f"{address} has joined the cluster of {card.address}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: _tell(rendezvous, address))
        while node.alive and rendezvous.folder.exists():
            time.sleep(POLL_S)
    print(f"the cluster of {card.address} has ended")


def _tell(rendezvous: NodeRendezvous, address: str) -> None:
    print("SIGTERM received: the head is told, and saves", file=sys.stderr, flush=True)
    rendezvous.give_notice(address)


def _told(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{name} is not set: it must be the same on every node, as in: {name}=... make join")
    return value


if __name__ == "__main__":
    run_main(main)
