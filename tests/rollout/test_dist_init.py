"""The meeting point of an engine over several machines is at ports that are free on all of them."""

import socket

import pytest
import torch.distributed as dist

from recipe.engines.dist_init import DERIVED_FROM_ADDRESS, DistInit
from recipe.system.errors import UserError
from recipe.system.ports import LOCAL, reserve_derived


def test_a_store_is_there_with_the_ports_that_are_derived_from_its_own() -> None:
    asked: list[int] = []

    def free_elsewhere(port: int) -> bool:
        asked.append(port)
        return len(asked) == 3

    rendezvous = DistInit.open(LOCAL, free_elsewhere)
    host, port = rendezvous.address.split(":")
    assert (host, int(port)) == (LOCAL, asked[-1])
    assert len(set(asked)) == 3
    client = dist.TCPStore(host, int(port), is_master=False)
    client.set("node 1", "here")
    assert client.get("node 1") == b"here"
    for number in DERIVED_FROM_ADDRESS:
        # Nobody gets it who asks for any port, and SGLang does, which sets SO_REUSEADDR.
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((LOCAL, int(port) + number))
        with socket.create_server((LOCAL, int(port) + number)), socket.create_connection((LOCAL, int(port) + number)):
            pass
    rendezvous.close()
    with socket.socket() as anybody:
        anybody.bind((LOCAL, int(port) + DERIVED_FROM_ADDRESS[0]))


def test_a_port_whose_derived_ones_are_taken_is_no_meeting_point() -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        assert reserve_derived(taken.getsockname()[1] - DERIVED_FROM_ADDRESS[-1], DERIVED_FROM_ADDRESS) is None
    assert reserve_derived(65535 - DERIVED_FROM_ADDRESS[0], DERIVED_FROM_ADDRESS) is None
    with pytest.raises(UserError, match=f"free ports of {LOCAL} none had those free that SGLang opens beside it"):
        DistInit.open(LOCAL, lambda port: False)
