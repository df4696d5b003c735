"""Building the image: the same context for the same sources, and the build's output as it comes."""

import io
import os
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from recipe.container.engine import connect
from recipe.container.provenance import build_date
from recipe.system.errors import UserError
from recipe.system.files import sha256_file

ROOT = Path(__file__).parents[2]
IMAGE = "glm-flash-grpo"
DEFAULT_LOCK = Path("requirements/gpu.lock")
_DEFAULT_BASE = re.compile(r"^ARG BASE_IMAGE=(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Build:
    """What an image is made of."""

    tag: str = IMAGE
    base_image: str = ""
    """Empty: the one that the Dockerfile names by digest."""
    lock: Path = DEFAULT_LOCK
    """The packages, with hashes; relative to the repository."""

    def arguments(self) -> dict[str, str]:
        """The Dockerfile's arguments."""
        epoch = source_date_epoch()
        return {
            "BASE_IMAGE": self.base_image or default_base_image(),
            "LOCK": self._name_in_context,
            "GIT_COMMIT": git_commit(),
            "SOURCE_DATE_EPOCH": str(epoch),
            "BUILD_DATE": build_date(epoch),
        }

    def labels(self) -> dict[str, str]:
        """Besides those that the Dockerfile sets: what it cannot compute."""
        labels = {"grpo.recipe.lock.sha256": sha256_file(ROOT / self.lock)}
        _, _, digest = (self.base_image or default_base_image()).partition("@")
        return labels | ({"org.opencontainers.image.base.digest": digest} if digest else {})

    def command(self) -> list[str]:
        """The build by Docker's command line, for a user to read."""
        words = ["docker", "build", "--tag", self.tag]
        words += [word for name, value in self.arguments().items() for word in ("--build-arg", f"{name}={value}")]
        words += [word for name, value in self.labels().items() for word in ("--label", f"{name}={value}")]
        return [*words, "."]

    def context(self) -> bytes:
        """The build context as a tar file: equal bytes for equal sources, whoever has checked them out and when."""
        from docker.utils.build import exclude_paths

        patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
        names = sorted(exclude_paths(str(ROOT), patterns, dockerfile="Dockerfile"))
        files = {name: ROOT / name for name in names if (ROOT / name).is_file()}
        files[self._name_in_context] = ROOT / self.lock
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, path in sorted(files.items()):
                content = path.read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), source_date_epoch()
                entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                tar.addfile(entry, io.BytesIO(content))
        return packed.getvalue()

    @property
    def _name_in_context(self) -> str:
        """A lock from elsewhere goes along under its name."""
        return str(self.lock) if not self.lock.is_absolute() else f"requirements/{self.lock.name}"


def build_image(build: Build) -> str:
    """Builds the image and prints the engine's output as it comes. Returns the image's id. Raises UserError with the
    engine's last words if a step fails."""
    with connect() as client:
        context = build.context()
        print(f"sending {len(context) / 1e6:.1f} MB of sources to the container engine", flush=True)
        events = client.api.build(
            fileobj=io.BytesIO(context),
            custom_context=True,
            tag=build.tag,
            buildargs=build.arguments(),
            labels=build.labels(),
            rm=True,
            forcerm=True,
            decode=True,
        )
        for event in events:
            if "error" in event:
                raise UserError(f"the image was not built: {event['error'].strip()}")
            print(event.get("stream") or _progress(event), end="", flush=True)
        return str(client.images.get(build.tag).id)


def _progress(event: dict[str, object]) -> str:
    """What to show of a layer of the base image that is being fetched: the beginning and the end, not every step."""
    status = str(event.get("status", ""))
    return "" if not status or event.get("progressDetail") else f"{status}\n"


def default_base_image() -> str:
    """The base that the Dockerfile names."""
    found = _DEFAULT_BASE.search((ROOT / "Dockerfile").read_text())
    assert found
    return found[1]


def git_commit() -> str:
    """The commit of the sources, with -dirty if they differ from it; unknown outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-dirty" if _git("status", "--porcelain") else commit


def source_date_epoch() -> int:
    """SOURCE_DATE_EPOCH, or the time of the commit, or 0. Raises UserError if it is no number."""
    given = os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct") or "0"
    if not given.isdigit():
        raise UserError(f"SOURCE_DATE_EPOCH={given!r} must be a number of seconds since 1970")
    return int(given)


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
