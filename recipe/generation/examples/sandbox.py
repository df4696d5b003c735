"""Runs the Python code on its standard input with little of the machine: limits of memory, time, files and processes
and, unless --limits-only is given, no network, no other processes in sight, and a file system that cannot be written.

A program of its own, which needs nothing but Python. Its output begins with READY, or says why the code was not run.
"""

import ctypes
import os
import resource
import signal
import sys

READY = "\x06"
MEMORY_BYTES, CPU_S, OPEN_FILES = 1 << 30, 20, 32
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Mounts, IPC, users, processes, network."""
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def main(words: list[str]) -> None:
    code = sys.stdin.read()
    try:
        if "--limits-only" not in words:
            confine()
        limit()
    except OSError as error:
        print(f"{error}; it takes user namespaces, which containers often lack")
        sys.exit(1)
    print(end=READY, flush=True)
    exec(compile(code, "<tool_call>", "exec"), {"__name__": "__main__"})


def confine() -> None:
    """Goes on in namespaces of its own, as their first process: when it dies, all that it started does."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(NEW_NAMESPACES), "no namespaces")
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "no end with its parent")
    _check(libc.mount(b"none", b"/proc", b"tmpfs", 0, None), "no /proc of its own")
    read_only = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    arguments = (AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only))
    _check(libc.syscall(SYS_MOUNT_SETATTR, *arguments), "no file system that cannot be written")


def limit() -> None:
    """Bounds what it may take, for good."""
    _check(ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no bound on privileges")
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))


def _check(status: int, problem: str) -> None:
    if status < 0:
        raise OSError(ctypes.get_errno(), f"{problem} ({os.strerror(ctypes.get_errno())})")


if __name__ == "__main__":
    main(sys.argv[1:])
