"""How the nodes of a cluster find one another: a folder on the storage that all of them share.

The head writes the run's token and what it runs with into `BASE_DIR/.recipe-cluster`; a node that joins reads both,
compares, and leaves a card of its own, which the head must see. So a folder that is not the same everywhere, or a node
with other packages, is found before anything is trained. A node that will be taken away says so there, too.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

from recipe.container.provenance import inside_image, read_provenance
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text

FOLDER = ".recipe-cluster"
POLL_S = 0.5
_SOURCES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Software:
    """What must be the same on every node."""

    python: str
    packages: str
    """Hash of all names and versions."""
    sources: str
    """Hash of the recipe's own code."""
    image_lock: str
    """Hash of the lock that the image was built from, or nothing outside an image."""

    @classmethod
    def here(cls) -> "Software":
        """The software of this process."""
        versions = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()})
        code = hashlib.sha256()
        for path in sorted(_SOURCES.rglob("*.py")):
            code.update(str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes())
        return cls(
            platform.python_version(),
            hashlib.sha256("\n".join(versions).encode()).hexdigest(),
            code.hexdigest(),
            read_provenance()["lock_sha256"] if inside_image() else "",
        )

    def differences(self, other: "Software") -> list[str]:
        """What another node has differently."""
        return [
            f"{name} {mine} and {asdict(other)[name]}"
            for name, mine in asdict(self).items()
            if mine != asdict(other)[name]
        ]


@dataclass(frozen=True)
class HeadCard:
    """What the head tells those who join."""

    address: str
    port: int
    nonce: str
    """A random text of this start of the cluster."""
    object_store: int
    """Bytes of Ray's object store, on every node."""
    software: Software


class NodeRendezvous:
    """The folder. The head opens it and removes it; nodes that join only add to it."""

    def __init__(self, base_dir: Path) -> None:
        self.folder = base_dir / FOLDER
        self.token = self.folder / "token"
        self._head, self._nodes, self._notices = (self.folder / name for name in ("head.json", "nodes", "notices"))

    def open(self) -> None:
        """Makes the folder anew, with a fresh token that only this user can read. Raises UserError if it cannot."""
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)
            self._nodes.mkdir()
            self._notices.mkdir()
            write_token(self.token)
        except OSError as error:
            raise UserError(f"the nodes cannot meet in {self.folder}: {error}; BASE_DIR must be writable") from error

    def announce(self, address: str, port: int, object_store: int) -> HeadCard:
        """Leaves the card of the head, which answers at `address` and `port`, and returns it."""
        card = HeadCard(address, port, secrets.token_hex(8), object_store, Software.here())
        atomic_write_text(self._head, json.dumps(asdict(card)))
        return card

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_head(self, master_addr: str, timeout_s: float) -> HeadCard:
        """The head's card, when it is there and of the head at `master_addr`. Raises UserError if it never comes."""
        deadline, seen = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            if self._head.exists():
                values = json.loads(self._head.read_text())
                card = HeadCard(**values | {"software": Software(**values["software"])})
                if card.address == master_addr:
                    return card
                seen = f"; there is one of a head at {card.address}"
            time.sleep(POLL_S)
        raise UserError(
            f"no head at {master_addr} has left its card in {self.folder} for {timeout_s:g} s{seen}: start it "
            "first, and let BASE_DIR be the same storage on every node and MASTER_ADDR the head's address"
        )

    def introduce(self, address: str, card: HeadCard) -> None:
        """Leaves the card of the node at `address`. Raises UserError if it runs other software than the head."""
        if differences := card.software.differences(Software.here()):
            raise UserError(
                f"this node is not like the head at {card.address}: {'; '.join(differences)}; use one image and one "
                "commit on all nodes"
            )
        atomic_write_text(self._nodes / address, card.nonce)

    def introduced(self, card: HeadCard) -> set[str]:
        """Addresses of the nodes that have left their card for this start of the cluster."""
        return {
            path.name
            for path in self._nodes.iterdir()
            if not path.name.startswith(".") and path.read_text() == card.nonce
        }

    def give_notice(self, address: str) -> None:
        """The node at `address` will be taken away."""
        if self._notices.exists():
            atomic_write_text(self._notices / address, "")

    def notices(self) -> list[str]:
        """Addresses of the nodes that will be taken away."""
        return sorted(path.name for path in self._notices.iterdir() if not path.name.startswith("."))


def write_token(path: Path) -> None:
    """A fresh token, in a file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def check_own_address(address: str) -> None:
    """Raises UserError if `address` is none of this machine's."""
    try:
        socket.create_server((address, 0)).close()
    except OSError as error:
        raise UserError(
            f"{address} (MASTER_ADDR, --master-addr) is no IPv4 address of this machine, which is to be the head: "
            f"{error}"
        ) from error


def check_reachable(address: str, port: int, timeout_s: float = 10.0) -> str:
    """This machine's address on the way to `address`. Raises UserError if nobody answers there."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"the head at {address}:{port} cannot be reached from this node ({error}): MASTER_ADDR must be an "
            "address of the head that every node reaches, with no firewall between them"
        ) from error
