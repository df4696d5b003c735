"""The 24-GPU recipe's engine: three actors and three command lines, on machines that are named only."""

import sys
from pathlib import Path
from typing import Any

from recipe.config import resolve
from recipe.engines.launch import Node, SglangServer, launch_sglang
from recipe.plan.options import PUBLISHED

MACHINES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
RECIPE = ["--recipe", "glm4.7-flash-24gpu", "--hf-checkpoint", str(PUBLISHED), "--master-addr", MACHINES[0]]


def test_one_engine_of_24_gpus_is_three_processes_of_eight(monkeypatch: Any) -> None:
    from recipe.cluster.placement import Placement
    from recipe.config import sglang_rules
    from recipe.engines import launch

    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    monkeypatch.setattr(launch, "find_sglang_python", lambda named: Path(sys.executable))
    config = resolve(RECIPE).config
    group: Any = "the cluster's"
    # Ray's bundles in another order than the machines'.
    bundles = [*range(8, 16), *range(8), *range(16, 24)]
    seats = Placement(group, bundles, [*range(8)] * 3, True, config).seats(0)
    assert [seat.gpus for seat in seats] == [tuple(range(8))] * 3
    assert [seat.options["scheduling_strategy"].placement_group_bundle_index for seat in seats] == [8, 0, 16]

    for rank, (seat, address) in enumerate(zip(seats, MACHINES, strict=True)):
        node = Node(rank, len(seats), f"{MACHINES[0]}:4321", address, {"NCCL_SOCKET_IFNAME": "eth1"})
        started = launch_sglang(
            Path("/model"),
            SglangServer.of(config, seat.gpus, node),
            weight_version="initial",
            threads=1,
            context_length=4096,
        )
        words = dict(zip(started.arguments, started.arguments[1:], strict=False))
        expected = {
            "--nnodes": "3",
            "--node-rank": str(rank),
            "--dist-init-addr": "10.0.0.1:4321",
            "--tp-size": "24",
            "--dp-size": "6",
            "--ep-size": "24",
            "--ep-num-redundant-experts": "8",
        }
        assert {name: words[name] for name in expected} == expected
        assert "--enable-dp-attention" in started.arguments
        assert "--enable-memory-saver" in started.arguments
        environment = started.environment
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        # Its processes meet in our store, and listen at their machine's address.
        assert environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "tcp://10.0.0.1:4321"
        assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"
        assert environment["SGLANG_HOST_IP"] == address
        assert environment["NCCL_SOCKET_IFNAME"] == "eth1"
        assert "GLOO_SOCKET_IFNAME" not in environment
