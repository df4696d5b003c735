"""Ports that servers are told of, and those that SGLang derives from them: free when they are chosen, and kept from
everybody who asks for just any port."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack

from recipe.system.errors import UserError

LOCAL = "127.0.0.1"

DERIVED_FROM_PORT = (13, *range(234, 240))
"""On an engine on one machine with DP attention: by how much the ports that SGLang opens beside its own are above it
(sglang.srt.server_args.PortArgs, ZMQ_TCP_PORT_DELTA, DP_ATTENTION_HANDSHAKE_PORT_DELTA)."""

PORT_ATTEMPTS = 50
"""Free ports that are tried until one has free ones beside it."""


def reserve_port(host: str = LOCAL) -> socket.socket:
    """A socket bound to a free port. While it is open the kernel gives the port to nobody who asks for just any, but a
    server may listen there, since servers set SO_REUSEADDR as this socket does."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((host, 0))
    return reservation


def reserve_derived(port: int, distances: Sequence[int]) -> ExitStack | None:
    """Keeps the ports that are by `distances` above `port` on this machine, as `reserve_port` does, until it is closed;
    None if one is taken. They are bound to every address, as SGLang asks for them so; nobody listens."""
    with ExitStack() as stack:
        for distance in distances:
            reservation = stack.enter_context(socket.socket())
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                reservation.bind(("0.0.0.0", port + distance))
            except (OSError, OverflowError):
                return None
        return stack.pop_all()


def reserve_port_with(host: str, distances: Sequence[int]) -> tuple[int, ExitStack]:
    """A free port of `host` that has those by `distances` above it free, and what keeps them all until it is closed.
    Raises UserError if none is found."""
    for _ in range(PORT_ATTEMPTS):
        reservation = reserve_port(host)
        port: int = reservation.getsockname()[1]
        derived = reserve_derived(port, distances)
        if derived is not None:
            derived.enter_context(reservation)
            return port, derived
        reservation.close()
    raise no_port_found(host, "here")


def no_port_found(host: str, where: str) -> UserError:
    """That every port tried has a neighbour that is taken."""
    return UserError(
        f"of {PORT_ATTEMPTS} free ports of {host} none had those free that SGLang opens beside it, {where}: see what "
        "listens there (ss -ltnp)"
    )
