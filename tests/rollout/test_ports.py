"""A server's port is chosen with those that SGLang derives from it, and all are kept for it."""

import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.engines.launch import Node, SglangServer, launch_sglang
from recipe.system import ports
from recipe.system.errors import UserError
from recipe.system.ports import DERIVED_FROM_PORT, LOCAL, reserve_port, reserve_port_with

DERIVED_BY_SGLANG = """
import sys, types
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
from sglang.srt import server_args
from sglang.srt.managers.data_parallel_controller import DP_ATTENTION_HANDSHAKE_PORT_DELTA

class Arguments:
    port, dist_init_addr, nnodes, dp_size, enable_dp_attention = int(sys.argv[1]), None, 1, 2, True
    nccl_port, tokenizer_worker_num, decoupled_spec_role, ep_join_mode = 1, 1, "null", "null"

server_args.resolving_view = lambda arguments: arguments
derived = server_args.PortArgs.init_new(Arguments())
names = [name for name in vars(derived).values() if str(name).startswith("tcp://")]
print(DP_ATTENTION_HANDSHAKE_PORT_DELTA, *(int(name.rpartition(":")[2]) - Arguments.port for name in names))
"""


def test_a_reserved_port_is_only_for_a_server_that_was_told_of_it() -> None:
    with reserve_port() as reservation:
        address = reservation.getsockname()
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(address)
        with socket.create_server(address), socket.create_connection(address, timeout=5):
            pass


def test_a_port_is_passed_over_when_one_that_is_derived_from_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        before_taken: int = taken.getsockname()[1] - 6
        offered = [SimpleNamespace(getsockname=lambda: (LOCAL, before_taken), close=lambda: None)]
        monkeypatch.setattr(ports, "reserve_port", lambda host: offered.pop() if offered else reserve_port(host))
        port, reservation = reserve_port_with(LOCAL, (3, 6))
    with reservation:
        assert port != before_taken
        assert not offered
        for number in (0, 3, 6):
            with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
                stranger.bind((LOCAL, port + number))
            socket.create_server((LOCAL, port + number)).close()
    socket.create_server((LOCAL, port + 3)).close()


def test_where_no_port_has_free_neighbours_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "reserve_derived", lambda port, distances: None)
    with pytest.raises(UserError, match=f"of 50 free ports of {LOCAL} none had those free that SGLang opens beside it"):
        reserve_port_with(LOCAL, (1,))


@pytest.mark.parametrize("on_gpus", [True, False])
def test_only_attention_that_is_data_parallel_on_one_machine_derives_ports_from_the_servers_own(on_gpus: bool) -> None:
    def derived(*arguments: str, node: Node | None = None) -> tuple[int, ...]:
        server = SglangServer(Path("python"), () if on_gpus else None, arguments, node=node)
        launch = launch_sglang(Path("/model"), server, weight_version="1", threads=1, context_length=64)
        return launch.derived_ports

    assert derived("--enable-dp-attention") == DERIVED_FROM_PORT
    assert derived("--enable-dp-lm-head") == ()
    assert derived("--enable-dp-attention", node=Node(0, 2, f"{LOCAL}:1", LOCAL, {})) == ()


@pytest.mark.sglang
def test_sglang_takes_the_ports_that_are_kept_for_it(sglang_python: Path) -> None:
    environment = {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "file:///nowhere", "PATH": "/usr/bin:/bin"}
    port, reservation = reserve_port_with(LOCAL, DERIVED_FROM_PORT)
    with reservation:
        command = [str(sglang_python), "-c", DERIVED_BY_SGLANG, str(port)]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert told.returncode == 0, told.stderr
    assert set(map(int, told.stdout.split())) == set(DERIVED_FROM_PORT)
