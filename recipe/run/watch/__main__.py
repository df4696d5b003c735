"""A page on which the runs of a folder are watched: python -m recipe.run.watch RUNS_DIR [--port 8642]

RUNS_DIR is the folder of the runs, or one run. The page is at this machine's own address only; from another one it is
reached by the ssh tunnel that is printed. It reads files and starts nothing; end it by Ctrl-C.
"""

import argparse
import asyncio
import errno
import getpass
import signal
import socket
from pathlib import Path

from aiohttp import web

from recipe.run.watch.server import PageServer
from recipe.system.errors import UserError, run_main

LOOPBACK = "127.0.0.1"
PORT = 8642


async def serve(folder: Path, port: int) -> None:
    """Serves until SIGINT or SIGTERM. Raises UserError for a folder that is not there, or a port that is taken."""
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runner = web.AppRunner(PageServer(folder).application(), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, LOOPBACK, port)
        try:
            await site.start()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(f"port {port} is taken: give another --port, or 0 for any that is free") from error
        found = runner.addresses[0][1]
        print(f"{folder}: http://{LOOPBACK}:{found}/", flush=True)
        here = f"{getpass.getuser()}@{socket.gethostname()}"
        print(f"from another machine: ssh -L {found}:{LOOPBACK}:{found} {here}, then the same address", flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.run.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="the folder of the runs, or one run")
    parser.add_argument("--port", type=int, default=PORT, help=f"of this machine's own address (default: {PORT})")
    options = parser.parse_args()
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port {options.port} is no port: they go up to 65535")
    asyncio.run(serve(options.runs, options.port))


if __name__ == "__main__":
    run_main(main)
