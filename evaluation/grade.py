"""Grades stored responses.

Usage: python -m evaluation.grade [--rm-type TYPE] [--timeout-s 5] [--workers N] < responses.jsonl > verdicts.jsonl

A line of the input is {"response": TEXT, "label": TEXT or NUMBER}, and may have "finish_reason" ("length", or SGLang's
{"type": "length"}: the engine cut it off) and "prompt" (what the model read: it tells whether the response begins in
the thinking part). For each a line {"verdict", "answer", "reason"} is written; verdict is correct, wrong, no_answer,
truncated or grader_failed. With --rm-type the answer is looked for where that reward looks, and labels are what it
takes. A label that cannot be read whole is refused, with its line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from evaluation.grading import Judge, Response
from evaluation.options import check_grading_time, finite
from recipe.rewards import REWARD_RULES, RewardType
from recipe.rewards.extract import answer_after_thinking
from recipe.sampling.sample import FinishReason
from recipe.system.errors import UserError, run_main, shortened

BATCH = 1024
"""Lines that are graded together, and then written."""

LabelProblem = Callable[[str], str | None]


def read_response(line: str, number: int, label_problem: LabelProblem) -> Response:
    """The response on a line; lines are numbered from 1. Raises UserError, with the number, if there is none, or if its
    label is none by `label_problem`."""
    where = f"standard input, line {number}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON, perhaps cut off ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object")
    for key in ("response", "label"):
        if key not in fields:
            raise UserError(f"{where}: there is no {key!r} among {', '.join(map(repr, fields)) or 'its fields'}")
    response, label, prompt = fields["response"], fields["label"], fields.get("prompt")
    if not isinstance(response, str):
        raise UserError(f"{where}: 'response' is not a text")
    if isinstance(label, bool) or not isinstance(label, str | int | float) or not str(label).strip():
        raise UserError(f"{where}: the label {json.dumps(label)} is no answer: it is neither a text nor a number")
    if problem := label_problem(str(label)):
        raise UserError(f"{where}: the label {shortened(str(label))} is no answer: it {problem}")
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt' is not a text")
    return Response(response, str(label).strip(), _is_cut_off(fields.get("finish_reason"), where), prompt)


def _is_cut_off(reason: object, where: str) -> bool:
    match reason:
        case None | str():
            return reason == FinishReason.LENGTH
        case {"type": str(kind)}:
            return kind == FinishReason.LENGTH
    raise UserError(f"{where}: 'finish_reason' is neither a text nor an object with a type")


def grade_lines(lines: Iterable[str], judge: Judge, label_problem: LabelProblem) -> Iterator[str]:
    """The line of verdict for each line that is not blank, as they are known. Raises UserError for a bad line, after
    the verdicts of those before it."""
    responses = (read_response(line, number, label_problem) for number, line in enumerate(lines, 1) if line.strip())
    for batch in _batches(responses):
        for judgement in judge.judge(batch):
            yield json.dumps({"verdict": judgement.verdict, "answer": judgement.answer, "reason": judgement.reason})


def _batches(responses: Iterable[Response]) -> Iterator[list[Response]]:
    batch: list[Response] = []
    try:
        for response in responses:
            batch.append(response)
            if len(batch) == BATCH:
                yield batch
                batch = []
    except UserError:
        yield batch
        raise
    yield batch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rm-type",
        type=RewardType,
        choices=list(RewardType),
        help="the reward whose rules are followed (default: the last box after thinking, if there is any)",
    )
    parser.add_argument("--timeout-s", type=finite, default=5.0, help="longest time to compare two answers, in seconds")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compare (default: the cores)"
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise UserError("--workers must be at least 1")
    check_grading_time("--timeout-s", arguments.timeout_s)
    rule = REWARD_RULES[arguments.rm_type or RewardType.MATH]
    extract = rule.extract if arguments.rm_type else answer_after_thinking
    lines = (line.decode(errors="replace") for line in sys.stdin.buffer)
    with Judge(extract, timeout_s=arguments.timeout_s, num_workers=arguments.workers) as judge:
        for line in grade_lines(lines, judge, rule.label_problem):
            print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
