"""A server whose answers are known, and evaluations that use it."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from evaluation.aime import Evaluation, open_evaluation
from evaluation.grading import Verdict
from evaluation.options import parse
from evaluation.result import Result

QUESTIONS = {
    "a": ("1+2=", 3),
    "b": ("4+5=", 9),
    "c": ("0+0=", 0),
    "d": ("9+9=", 18),
    "e": ("2+2=", 4),
    "f": ("5+5=", 10),
}
N_SAMPLES = 4
MAX_TOKENS = 12
STALL_S = 600.0
"""Longer than any test waits."""

_KINDS = (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.TRUNCATED, Verdict.CORRECT)


def kind_of(seed: int) -> Verdict:
    """What the server makes of a sample with this seed."""
    return _KINDS[seed % len(_KINDS)]


@dataclass
class KnownServer:
    """Answers /generate by the seeds alone: right, wrong, without an answer, or cut off. `fault` may do otherwise: it
    gets the seed and how often that was asked before, and gives a status, a body, or None to let the answer stand."""

    labels: dict[str, int]
    """The label of a prompt, by a part of its text."""
    checkpoint: Path
    version: str = "1"
    dtype: str = "bfloat16"
    healthy: bool = True
    fault: Callable[[int, int], int | str | None] | None = None
    info: str | None = None
    """Its answer to /model_info, instead of the true one."""
    stalls: bool = False
    """It answers nothing any more, but lets everybody connect."""
    asked: Counter[int] = field(default_factory=Counter)
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    """Ends what stalls."""

    def stall(self) -> None:
        """For as long as anybody might wait."""
        self.over.wait(STALL_S)

    def answer(self, body: dict[str, Any], text_of: Callable[[list[int]], str]) -> int | str:
        """The JSON of an answer, or a status."""
        answers = []
        for ids, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            seed = params["sampling_seed"]
            before, self.asked[seed] = self.asked[seed], self.asked[seed] + 1
            wrong = None if self.fault is None else self.fault(seed, before)
            if wrong is not None:
                return wrong
            prompt = text_of(ids)
            label = next(label for part, label in self.labels.items() if part in prompt)
            answers.append(self._sample(label, seed))
        return json.dumps(answers)

    def _sample(self, label: int, seed: int) -> dict[str, Any]:
        kind = kind_of(seed)
        text = {
            Verdict.CORRECT: f"so</think>\\boxed{{0{label}}}",
            Verdict.WRONG: f"so</think>\\boxed{{{label + 1 + seed % 2}}}",
            Verdict.NO_ANSWER: f"so \\boxed{{{label}}}",
            Verdict.TRUNCATED: f"so \\boxed{{{label}}}, or",
        }[kind]
        tokens = MAX_TOKENS if kind is Verdict.TRUNCATED else 1 + seed % (MAX_TOKENS - 1)
        return {
            "text": text,
            "output_ids": [7] * tokens,
            "meta_info": {
                "finish_reason": {"type": "length" if kind is Verdict.TRUNCATED else "stop"},
                "weight_version": self.version,
                "output_token_logprobs": [[-0.5, 7, None]] * tokens,
            },
        }


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving(server: KnownServer) -> Iterator[KnownServer]:
    """Lets the server answer at `server.url`."""
    from recipe.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(server.checkpoint)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if server.stalls:
                server.stall()
            elif self.path == "/model_info":
                info = {"model_path": str(server.checkpoint), "weight_version": server.version}
                self._send(json.dumps(info) if server.info is None else server.info)
            elif self.path == "/server_info":
                self._send(json.dumps({"port": self.connection.getsockname()[1], "dtype": server.dtype}))
            else:
                self._send("{}" if server.healthy else 503)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.stalls:
                server.stall()
            self._send(server.answer(body, tokenizer.decode))

        def _send(self, answer: int | str) -> None:
            content = answer.encode(errors="surrogateescape") if isinstance(answer, str) else b"{}"
            try:
                self.send_response(200 if isinstance(answer, str) else answer)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, *_: object) -> None:
            """Nothing."""

    listener = _Listener(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        listener.shutdown()
        thread.join()
        listener.server_close()


def write_questions(path: Path, questions: dict[str, tuple[str, int]] | None = None) -> Path:
    """A file of problems."""
    lines = [
        {"id": name, "prompt": [{"role": "user", "content": text}], "label": str(label)}
        for name, (text, label) in (questions or QUESTIONS).items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def open_one(*words: object) -> Evaluation:
    """The evaluation of a command line, with few short samples."""
    defaults = ["--n-samples", N_SAMPLES, "--max-response-len", MAX_TOKENS, "--instruction", ""]
    return open_evaluation(parse(None, [str(word) for word in [*defaults, *words]]))


def evaluate(*words: object) -> Result:
    """Carries it out, files included."""
    with open_one(*words) as evaluation:
        result = evaluation.complete()
        evaluation.directory.finish(result)
    return result


def lines_of(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
