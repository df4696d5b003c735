"""What the model reads, and that the result says so."""

import hashlib
import json
from pathlib import Path

from evaluation_support import QUESTIONS, KnownServer, evaluate

from evaluation.problems import INSTRUCTION, ProblemFile, digest, read_problems


def write(path: Path, *prompts: object) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "label": "5"}) + "\n" for prompt in prompts))
    return path


def test_the_instruction_is_added_where_nothing_asks_for_a_box(checkpoint: Path, tmp_path: Path) -> None:
    asks = "1+4? Put it in \\boxed{}."
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+2?"}]
    file = ProblemFile(write(tmp_path / "x.jsonl", "2+3?", asks, chat))
    texts = [problem.text for problem in read_problems(file, checkpoint, max_tokens=1000)]
    assert texts == [
        f"[gMASK]<sop><|user|>2+3?\n\n{INSTRUCTION}<|assistant|><think>",
        f"[gMASK]<sop><|user|>{asks}<|assistant|><think>",
        f"[gMASK]<sop><|system|>Be brief.<|user|>3+2?\n\n{INSTRUCTION}<|assistant|><think>",
    ]


def test_the_result_has_the_exact_prompts_and_their_hashes(server: KnownServer, data: Path, tmp_path: Path) -> None:
    result = evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out")
    problems = read_problems(ProblemFile(data, instruction=""), server.checkpoint, max_tokens=1000)
    assert [problem.prompt for problem in result.problems] == [problem.text for problem in problems]
    assert [problem.id for problem in result.problems] == list(QUESTIONS)
    for problem in result.problems:
        assert problem.prompt_sha256 == hashlib.sha256(problem.prompt.encode()).hexdigest()
    assert result.settings.prompts_sha256 == digest(problems)
    other = read_problems(ProblemFile(data, instruction="Box."), server.checkpoint, max_tokens=1000)
    assert digest(other) != digest(problems)
