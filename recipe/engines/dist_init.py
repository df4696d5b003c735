"""Where the processes of an engine over several machines meet: SGLang's `--dist-init-addr`.

SGLang would open a store there, on every address of the first machine. Instead we open it, at one address and a port
that is free, and tell torch, as its elastic launcher does, that it is there. With DP attention SGLang derives more
ports from this one, and asks on each machine whether they are free before it starts.
"""

import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Self

from recipe.system.ports import PORT_ATTEMPTS, no_port_found, reserve_derived
from recipe.system.tcp_store import open_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

DERIVED_FROM_ADDRESS = (*range(1, 7), 13)
"""By how much they are above the address's own (sglang.srt.server_args.PortArgs, DP_ATTENTION_HANDSHAKE_PORT_DELTA)."""


class DistInit:
    """The first machine's side: the store, and the ports that SGLang derives from its own."""

    def __init__(self, store: "TCPStore", derived: ExitStack) -> None:
        self.address = f"{store.host}:{store.port}"
        self._store: TCPStore | None = store
        self._derived = derived

    @classmethod
    def open(cls, host: str, free_elsewhere: Callable[[int], bool]) -> Self:
        """At `host`, which is this machine's, and a port for which the other machines say that its derived ports are
        free there. Raises UserError if none is found."""
        for _ in range(PORT_ATTEMPTS):
            with closing(socket.create_server((host, 0))) as listener:
                port: int = listener.getsockname()[1]
                derived = reserve_derived(port, DERIVED_FROM_ADDRESS)
                if derived is None:
                    continue
                if not free_elsewhere(port):
                    derived.close()
                    continue
                return cls(open_store(listener), derived)
        raise no_port_found(host, "on all machines of the engine")

    def close(self) -> None:
        """Gives store and ports back."""
        self._store = None
        self._derived.close()
