"""A small Hugging Face hub on 127.0.0.1 that can be told to misbehave."""

import hashlib
import json
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".jsonl", "tokenizer.json")


@dataclass(frozen=True)
class Request:
    path: str
    start: int | None
    """First byte of the range that was asked for."""
    token: str | None
    host: str

    @property
    def file(self) -> str | None:
        """The name of the file that was asked for; None for the interface."""
        return self.path.split("/resolve/")[1].split("/", 1)[1] if "/resolve/" in self.path else None


@dataclass
class Faults:
    """What goes wrong; by file name where it concerns a file."""

    cut_after: dict[str, deque[int]] = field(default_factory=lambda: defaultdict(deque))
    """Bytes after which the connection ends, for one request after the other."""
    reset: bool = False
    """A connection is cut by a reset instead of an orderly end."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """Bytes after which nothing more is sent."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Content that is sent instead of the right one."""
    statuses: dict[str, deque[int]] = field(default_factory=lambda: defaultdict(deque))
    """Answers of one request after the other; after them all is well."""
    ranges: bool = True
    token: str | None = None
    """Without it every answer is 401."""
    gated: bool = False
    """Every answer is 403, 401 without a token."""
    cdn: str | None = None
    """Base URL that files are redirected to."""
    missing: set[str] = field(default_factory=set)
    """Files that are listed, but not there."""
    gibberish: bool = False
    """Every answer is a page for people."""


class LoopbackHub(ThreadingHTTPServer):
    """Use as a context manager. Repositories are named like "models/zai-org/GLM-4.7-Flash"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults = Faults()
        self.requests: list[Request] = []
        self.released = threading.Event()
        """Ends the connections that stall."""
        self._files: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self._commits: dict[tuple[str, str], str] = {}

    def commit(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes `files` the content of the branch; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._files[repo, commit] = files
        self._commits[repo, branch] = self._commits[repo, commit] = commit
        return commit

    def files(self, repo: str, commit: str) -> Mapping[str, bytes]:
        return self._files[repo, commit]

    def resolve(self, repo: str, revision: str) -> str | None:
        return self._commits.get((repo, revision))

    def knows(self, repo: str) -> bool:
        return any(repo == known for known, _ in self._commits)

    def fetched(self) -> dict[str, list[int | None]]:
        """The first bytes of the ranges asked for, in order, by file."""
        starts = defaultdict(list)
        for request in self.requests:
            if request.file is not None:
                starts[request.file].append(request.start)
        return dict(starts)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error here."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        range_header = self.headers.get("Range")
        start = int(range_header.removeprefix("bytes=").removesuffix("-")) if range_header else None
        path = unquote(urlsplit(self.path).path).strip("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(path, start, token, self.headers["Host"])
        self.server.requests.append(request)
        if not self._refused(request):
            if request.file is None:
                self._info(*path.removeprefix("api/").split("/revision/"))
            else:
                self._file(request, *path.split("/resolve/"))

    def _refused(self, request: Request) -> bool:
        faults = self.server.faults
        if faults.gated:
            self._error(403 if request.token else 401, "GatedRepo")
        elif faults.token is not None and request.token != faults.token and self.headers["Host"] in self.server.url:
            self._error(401)
        elif faults.gibberish:
            self._send(200, b"<html>Please log in to the network</html>")
        elif request.file is not None and faults.statuses[request.file]:
            self._error(faults.statuses[request.file].popleft())
        else:
            return False
        return True

    def _error(self, status: int, code: str | None = None) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _info(self, repo: str, revision: str) -> None:
        commit = self.server.resolve(repo, revision)
        if commit is None:
            self._error(404, "RevisionNotFound" if self.server.knows(repo) else "RepoNotFound")
            return
        siblings = [_sibling(name, content) for name, content in self.server.files(repo, commit).items()]
        answer = {"id": repo.split("/", 1)[1], "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, request: Request, repo: str, rest: str) -> None:
        faults = self.server.faults
        commit, name = rest.split("/", 1)
        if faults.cdn is not None and self.headers["Host"] in self.server.url:
            self._send(302, b"", {"Location": f"{faults.cdn}/{request.path}"})
            return
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        content = self.server.files(repo, commit).get(name)
        if content is None or name in faults.missing:
            self._error(404, "EntryNotFound")
            return
        content = faults.served.get(name, content)
        # As on the real hub, what is compressed has no ranges.
        ranges = faults.ranges and "gzip" not in self.headers["Accept-Encoding"]
        start = request.start if ranges and request.start else 0
        if start >= len(content) > 0:
            self._error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self._body(name, content[start:])

    def _body(self, name: str, body: bytes) -> None:
        faults = self.server.faults
        if name in faults.stall_after:
            self.wfile.write(body[: faults.stall_after[name]])
            self.wfile.flush()
            self.server.released.wait()
        elif faults.cut_after[name]:
            self.wfile.write(body[: faults.cut_after[name].popleft()])
            self.wfile.flush()
        else:
            self.wfile.write(body)
            return
        self.close_connection = True
        if faults.reset:
            while self._unread():  # a reset throws it away
                time.sleep(0.01)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _unread(self) -> int:
        """Bytes that were sent, and that the other side, on this machine too, has not read (proc_net_tcp)."""
        ours, theirs = self.connection.getsockname()[1], self.connection.getpeername()[1]
        unread = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            local, remote, _, queues = line.split()[1:5]
            ports = [int(address.rpartition(":")[2], 16) for address in (local, remote)]
            sent, received = (int(queue, 16) for queue in queues.split(":"))
            if ports in ([ours, theirs], [theirs, ours]):
                unread += sent if ports[0] == ours else received
        return unread


def _sibling(name: str, content: bytes) -> dict[str, object]:
    sibling = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if name.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(content).hexdigest()
        return sibling | {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 130}}
    return sibling | {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
