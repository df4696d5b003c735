"""Running a command in the image: what it may use, what it sees, and how it ends."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import TYPE_CHECKING, Any

from recipe.container.build import IMAGE, ROOT
from recipe.container.engine import check_gpus, connect
from recipe.container.terminal import attach_terminal
from recipe.system.errors import UserError, drop_dead_output

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

WORKSPACE = PurePosixPath("/workspace")
IMAGE_UID = 10001
"""The image's own user: who commands run as when root starts them."""
SHARED_MEMORY_BYTES = 64 << 30
"""A limit, not a reservation: Ray's object store, NCCL's buffers and weights on their way to the engines lie there."""
ULIMITS = {"memlock": -1, "stack": 64 << 20, "nofile": 1 << 20}
"""Pinned memory for the optimizer and the bus, deep stacks of compiled kernels, a connection a sample."""
WRITABLE = (Path("runs"), Path("build"))
"""Folders that commands write to."""
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "HF_ENDPOINT")
"""Variables whose values are on no command line; an address may hold a password."""
PASSED = (*SECRETS, "BASE_DIR", "MASTER_ADDR", "NODE_ADDR", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG")
"""Variables that go along."""
INFINIBAND = Path("/dev/infiniband")


@dataclass(frozen=True)
class ContainerRun:
    """A command to run in the image."""

    command: Sequence[str]
    """Empty: a shell, on this terminal."""
    image: str = IMAGE
    gpus: bool = True
    """All of them; or none."""
    data: Path | None = None
    """A folder besides runs/ and build/ that the command sees under the same name, if it exists."""
    needs: str = ""
    """What the folder must hold; `.`: it must exist. Empty: the command can do without."""
    work_dir: Path = ROOT
    """Holds the folders runs/ and build/ that the command writes to."""
    several_nodes: bool = False
    """Whether processes on other machines must reach it: it has this machine's network then."""

    def options(self) -> dict[str, Any]:
        """The container, as the SDK spells it."""
        options: dict[str, Any] = {"image": self.image, "command": self._words}
        for _, option in self._options():
            options |= option
        return options

    def command_line(self) -> str:
        """The container by Docker's command line: pasted into a shell it does the same."""
        words = ["docker", "run", "--rm", *(word for words, _ in self._options() for word in words)]
        absent = [str(folder) for folder in self.folders() if not folder.exists()]
        owner = ["-o", str(IMAGE_UID), "-g", str(IMAGE_UID)] if os.getuid() == 0 else []
        before = f"{shlex.join(['install', '-d', *owner, *absent])} && " if absent else ""
        return before + shlex.join([*words, self.image, *self._words])

    def _options(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Each property of the container, as Docker's command line and as the SDK spell it."""
        yield ["--init"], {"init": True}
        yield ["--ipc", "private"], {"ipc_mode": "private"}
        yield ["--shm-size", str(SHARED_MEMORY_BYTES)], {"shm_size": SHARED_MEMORY_BYTES}
        yield ["--stop-signal", "SIGTERM"], {"stop_signal": "SIGTERM"}
        if self.interactive:
            yield ["--interactive", "--tty"], {"stdin_open": True, "tty": True}
        if self.gpus:
            yield ["--gpus", "all"], {"device_requests": [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]}
        if self.several_nodes:
            yield ["--network", "host"], {"network_mode": "host"}
            yield ["--cap-add", "IPC_LOCK"], {"cap_add": ["IPC_LOCK"]}
            if INFINIBAND.exists():
                yield ["--device", str(INFINIBAND)], {"devices": [f"{INFINIBAND}:{INFINIBAND}:rwm"]}
        limits = [f"{name}={limit}" for name, limit in ULIMITS.items()]
        yield (
            _each("--ulimit", limits),
            {"ulimits": [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in ULIMITS.items()]},
        )
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        shown = [name if name in SECRETS else f"{name}={value}" for name, value in environment.items()]
        yield _each("--env", shown), {"environment": environment}
        mounts = [{"Type": "bind", "Source": str(source), "Target": str(target)} for source, target in self._mounts()]
        yield _each("--mount", map(_as_csv, mounts)), {"mounts": mounts}
        if os.getuid() != 0:
            user = f"{os.getuid()}:{os.getgid()}"
            yield ["--user", user], {"user": user}
        yield ["--workdir", str(WORKSPACE)], {"working_dir": str(WORKSPACE)}

    @property
    def _words(self) -> list[str]:
        return list(self.command) or ["bash"]

    @property
    def interactive(self) -> bool:
        """Whether it is a shell."""
        return not self.command

    def folders(self) -> list[Path]:
        """What the command writes to."""
        return [self.work_dir.resolve() / folder for folder in WRITABLE]

    def _mounts(self) -> Iterator[tuple[Path, PurePosixPath]]:
        """Folders under the name they have here, so that a command means the same inside and outside."""
        for folder in self.folders():
            yield folder, WORKSPACE / folder.name
        if self.data is not None and (self.needs or (ROOT / self.data).is_dir()):
            yield (ROOT / self.data).resolve(), WORKSPACE / self.data

    def check_data(self) -> None:
        """Raises UserError if the folder of model and data, or what the command needs there, does not exist."""
        if self.data is None or not self.needs:
            return
        if not (ROOT / self.data).is_dir():
            raise UserError(
                f"BASE_DIR={self.data} is no folder on this machine: name the one of model and data, or make it by "
                f"`make download BASE_DIR={shlex.quote(str(self.data))}`"
            )
        if not (ROOT / self.data / self.needs).is_dir():
            raise UserError(
                f"BASE_DIR={self.data} holds no {self.needs}: "
                f"`make download BASE_DIR={shlex.quote(str(self.data))}` fetches it"
            )


def run_in_image(run: ContainerRun) -> int:
    """Runs the command in a container of its own, which ends with this call, and returns its exit status (for one that
    a signal ended: 128 plus its number). SIGINT and SIGTERM are passed on to it.

    Raises UserError if there is no engine, no image, no GPU where one is asked for, no data where it needs them, or a
    folder it cannot write to.
    """
    run.check_data()
    with connect() as client:
        _check_image(client, run.image)
        if run.gpus and _is_local():
            check_gpus()
        for folder in run.folders():
            _make_writable(folder)
        container = client.containers.create(**run.options())
        try:
            return _attend(client, container, run)
        finally:
            container.remove(v=True, force=True)


def _attend(client: "DockerClient", container: "Container", run: ContainerRun) -> int:
    if run.interactive:
        attach_terminal(client, container)
    else:
        # Attached before it starts: no word of it is lost.
        output = container.attach(stream=True, logs=False)
        with _passing_signals_on(lambda name: client.api.kill(str(container.id), name)):
            container.start()
            for chunk in output:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
    return int(container.wait()["StatusCode"])


@contextmanager
def _passing_signals_on(send: Callable[[str], None]) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            drop_dead_output()
        print(f"{name} is passed on to the container", file=sys.stderr, flush=True)
        send(name)

    passed = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        passed.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in passed}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_image(client: "DockerClient", image: str) -> None:
    from docker.errors import ImageNotFound

    try:
        client.images.get(image)
    except ImageNotFound as error:
        raise UserError(f"there is no image {image} on this machine: build it with `make image`") from error


def _each(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _as_csv(mount: dict[str, str]) -> str:
    """A mount as Docker's command line takes it, which reads fields of a table: one with a comma is quoted."""
    fields = [f"{key.lower()}={value}" for key, value in mount.items()]
    return ",".join('"{}"'.format(field.replace('"', '""')) if set(field) & set(',"') else field for field in fields)


def _is_local() -> bool:
    return os.environ.get("DOCKER_HOST", "unix://").startswith("unix://")


def _make_writable(folder: Path) -> None:
    """Makes the folder. What root starts runs as the image's user, to whom the folder must belong then."""
    if not folder.exists():
        folder.mkdir(parents=True)
        if os.getuid() == 0:
            os.chown(folder, IMAGE_UID, IMAGE_UID)
    state = folder.stat()
    if os.getuid() == 0 and state.st_uid != IMAGE_UID and not state.st_mode & 0o002:
        raise UserError(
            f"{folder} is not writable for the image's user: chown -R {IMAGE_UID}:{IMAGE_UID} {folder}, or run this as "
            "the user who owns it"
        )
