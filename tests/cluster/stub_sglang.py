"""Stands for SGLang's interpreter: processes that serve when all of them have been given one --dist-init-addr, where
somebody listens. Whoever imported torch to meet in the store there would take two seconds for each of them."""

import http.server
import os
import socket
import sys
import time
from pathlib import Path

words = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
rank, nnodes = int(words["--node-rank"]), int(words["--nnodes"])
if Path(words["--model-path"], f"node-{rank}-fails").exists():
    sys.exit("ValueError: no room on this machine")
host, port = words["--dist-init-addr"].split(":")
assert os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"tcp://{host}:{port}"
socket.create_connection((host, int(port)), timeout=600).close()
print("node", rank, "of", nnodes, "is", os.getpid(), flush=True)
here = Path(words["--model-path"], f"met-at-{port}")
here.mkdir(exist_ok=True)
(here / str(rank)).touch()
while len(list(here.iterdir())) < nnodes:
    time.sleep(0.02)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


http.server.ThreadingHTTPServer((words["--host"], int(words["--port"])), Server).serve_forever()
