"""A real container engine of the tests' own, and what a build needs where no image registry is in reach."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TOOLS = ("dockerd", "mmdebstrap", "runc")
REQUIRED = "RECIPE_REQUIRE_CONTAINER_ENGINE"
"""Set where a missing engine is a failure: in CI."""

BASE = "local/cpu-base:test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
IMPORTED_CERTIFICATES = "/certificates.crt"
PINNED = re.compile(r"^([a-z0-9-]+)==[^\n]*\n(?: .*\n)*", re.MULTILINE)


def what_is_missing() -> str:
    """Why no engine can be started here, or nothing."""
    if os.getuid() != 0:
        return "a container engine of the tests' own needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (Debian: docker.io, mmdebstrap)" if missing else ""


@dataclass(frozen=True)
class Engine:
    """A dockerd of our own."""

    host: str

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that use it."""
        return {**os.environ, "DOCKER_HOST": self.host}

    def invoke(self, *words: object, timeout_s: float = 900, **variables: str) -> tuple[int, str]:
        """Runs one of the project's invoke tasks. Exit status, and what it printed."""
        ended = subprocess.run(
            [sys.executable, "-m", "invoke", *map(str, words)],
            cwd=ROOT,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return ended.returncode, ended.stdout


@contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """Starts dockerd with everything that is its own in `folder`, and ends it with its containers."""
    socket, pid_file, log = folder / "sock", folder / "pid", folder / "log"
    places = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", pid_file]
    # The wrapper and the hook stand in for privileges and an NVIDIA driver, which a CI machine has not.
    runtime = ["--add-runtime", f"clamped={HERE / 'oci_runtime.py'}", "--default-runtime", "clamped"]
    path = f"{HERE / 'no_gpu_hook'}:{os.environ['PATH']}"
    with log.open("w") as output:
        daemon = subprocess.Popen(
            ["dockerd", *map(str, places), "-H", f"unix://{socket}", *runtime],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path},
            start_new_session=True,
        )
    try:
        engine = Engine(f"unix://{socket}")
        deadline = time.monotonic() + 600
        while not answers(engine):
            assert daemon.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield engine
    finally:
        daemon.terminate()
        daemon.wait(600)
        shutil.rmtree(folder, ignore_errors=True)


def answers(engine: Engine) -> bool:
    """Whether the engine is up."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.DockerClient(base_url=engine.host)
        client.ping()
        client.close()
    except DockerException:
        return False
    return True


def import_base(engine: Engine, folder: Path) -> None:
    """Makes BASE: Debian with what the Dockerfile installs already there, the machine's certificates, and torch's CPU
    build, which is no package of the index's."""
    import docker

    packages = re.search(r"--no-install-recommends \\\n\s+(.*?) \\\n", (ROOT / "Dockerfile").read_text())
    assert packages
    include = ",".join(packages[1].split())
    archive = folder / "base.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={include}", "bookworm", str(archive)]
    subprocess.run(command, check=True, timeout=900)
    with tarfile.open(archive, "a") as tar:
        tar.add(CERTIFICATES, f".{IMPORTED_CERTIFICATES}")
        tar.add(torch_wheel(folder), f"./wheels/{torch_wheel(folder).name}")
    variables = {"PIP_CERT": IMPORTED_CERTIFICATES, "SSL_CERT_FILE": IMPORTED_CERTIFICATES, "PIP_FIND_LINKS": "/wheels"}
    if "PIP_INDEX_URL" in os.environ:
        variables["PIP_INDEX_URL"] = os.environ["PIP_INDEX_URL"]
    client = docker.DockerClient(base_url=engine.host, timeout=900)
    name, _, tag = BASE.partition(":")
    client.api.import_image_from_file(
        str(archive), repository=name, tag=tag, changes=[f"ENV {name}={value}" for name, value in variables.items()]
    )
    client.close()


def torch_wheel(folder: Path) -> Path:
    """torch's CPU build for the stand-in base's Python 3.11, from where scripts/install.sh takes it."""
    wheels = folder / "wheels"
    if not wheels.exists():
        [version] = re.findall(r"^torch==(\S+)$", (ROOT / "requirements" / "cpu.in").read_text(), re.MULTILINE)
        download = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
        download += ["--python-version", "3.11", "--dest", str(wheels), f"torch=={version}+cpu"]
        [index] = re.findall(r"^torch_cpu_index=(\S+)$", (ROOT / "scripts" / "install.sh").read_text(), re.MULTILINE)
        if subprocess.run(download, check=False, timeout=900).returncode:
            subprocess.run([*download, "--index-url", index], check=True, timeout=900)
    [wheel] = wheels.iterdir()
    return wheel


def cpu_subset(wheel: Path) -> str:
    """Of the image's lock, the packages that run without a GPU, under the same hashes, and torch's CPU build."""
    wanted = {match[1] for match in PINNED.finditer((ROOT / "requirements" / "cpu.lock").read_text())}
    whole = {match[1]: match[0] for match in PINNED.finditer((ROOT / "requirements" / "gpu.lock").read_text())}
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    torch = f"torch=={wheel.name.split('-')[1]} --hash=sha256:{digest}\n"
    return torch + "".join(text for name, text in whole.items() if name in wanted and name != "torch")
