"""Stands for SGLang's interpreter: processes that serve when all of them have met at --dist-init-addr."""

import http.server
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

words = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
rank, nnodes = int(words["--node-rank"]), int(words["--nnodes"])
if Path(words["--model-path"], f"node-{rank}-fails").exists():
    sys.exit("ValueError: no room on this machine")
host, port = words["--dist-init-addr"].split(":")
assert os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"tcp://{host}:{port}"
store = dist.TCPStore(host, int(port), timeout=timedelta(seconds=60))
print("node", rank, "of", nnodes, "is", os.getpid(), flush=True)
store.set(f"node {rank}", "here")
store.wait([f"node {number}" for number in range(nnodes)])


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


http.server.ThreadingHTTPServer((words["--host"], int(words["--port"])), Server).serve_forever()
