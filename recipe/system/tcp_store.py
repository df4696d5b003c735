"""The stores of torch.distributed in which processes meet. torch is loaded with the first of them."""

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore


def open_store(listener: socket.socket) -> "TCPStore":
    """A new store, on a socket that listens already: torch itself would listen on every address."""
    from torch.distributed import TCPStore

    host, port = listener.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(host: str, port: int) -> "TCPStore":
    """The store that another process has opened."""
    from torch.distributed import TCPStore

    return TCPStore(host, port)
