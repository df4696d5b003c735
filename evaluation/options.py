"""The command line of `evaluation.aime`."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.problems import INSTRUCTION
from evaluation.result import MODEL_CARD_RESPONSE_LEN
from evaluation.sampling import Limits
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

_TOKENS_A_SECOND_AT_LEAST = 10
_REQUEST_S = 600.0
_GRACE_S = 60.0
LONGEST_GRADING_S = 86400
"""The system's calls that wait take no time without bounds."""


@dataclass(frozen=True)
class Profile:
    """Sampling by a name."""

    max_response_len: int
    temperature: float
    top_p: float


SPECIFICATION = Profile(max_response_len=16_384, temperature=1.0, top_p=1.0)
PROFILES = {"model-card": Profile(max_response_len=MODEL_CARD_RESPONSE_LEN, temperature=1.0, top_p=0.95)}


def parse(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the sampling filled in. Raises UserError for values that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.aime", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model(parser)
    _add_problems(parser)
    _add_sampling(parser)
    _add_running(parser)
    arguments = parser.parse_args(argv)
    _fill_in(arguments)
    _check(arguments)
    return arguments


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """How responses are sampled."""
    return SamplingParams(
        max_new_tokens=arguments.max_response_len,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
    )


def engine_args(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Words for the engine. Raises UserError for quotes that are never closed."""
    try:
        return tuple(shlex.split(arguments.engine_args))
    except ValueError as error:
        raise UserError(f"--engine-args {arguments.engine_args!r} cannot be split into words: {error}") from error


def limits_of(arguments: argparse.Namespace) -> Limits:
    """When generation is given up."""
    stall_s = arguments.stall_timeout_s
    if stall_s is None:
        stall_s = request_timeout_s(arguments) + _GRACE_S
    return Limits(arguments.max_failures, arguments.health_timeout_s, stall_s)


def finite(text: str) -> float:
    """A number of the command line that is neither infinite nor nan."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def check_grading_time(flag: str, seconds: float) -> None:
    """Raises UserError unless the time to compare two answers is one that a process can be given."""
    if not 0 < seconds <= LONGEST_GRADING_S:
        raise UserError(f"{flag} must be greater than 0 and at most {LONGEST_GRADING_S} seconds")


def request_timeout_s(arguments: argparse.Namespace) -> float:
    """The longest wait for one response: as given, or ten minutes and what the longest takes at 10 tokens a second."""
    if arguments.request_timeout_s is not None:
        return float(arguments.request_timeout_s)
    return _REQUEST_S + arguments.max_response_len / _TOKENS_A_SECOND_AT_LEAST


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="Hugging Face directory; an engine is started")
    source.add_argument(
        "--checkpoint", type=Path, help="torch_dist directory, or training checkpoints, whose newest is taken"
    )
    source.add_argument("--url", help="a running server of SGLang's API, as http://127.0.0.1:30000")
    group.add_argument(
        "--hf-checkpoint",
        type=Path,
        help="configuration and tokenizer, for a --url elsewhere and a --checkpoint of no run",
    )
    group.add_argument("--engine", choices=("auto", "sglang", "embedded"), default="auto", help="which to start")
    group.add_argument("--engine-args", default="", help="passed on to the engine, as '--tp-size 8'")
    group.add_argument("--context-length", type=int, help="prompt and response in tokens (default: the model's)")


def _add_problems(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the problems")
    group.add_argument("--data", type=Path, required=True, help="jsonl, a problem a line")
    group.add_argument("--input-key", default="prompt", help="of the question: a text or chat messages")
    group.add_argument("--label-key", default="label", help="of the answer: an integer from 0 to 999")
    group.add_argument("--id-key", default="id", help="of the problem's name; may be missing")
    group.add_argument(
        "--instruction", default=INSTRUCTION, help="added to questions that do not ask for a box (default: %(default)r)"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--n-samples", type=int, default=16, help="of each problem (default: %(default)s)")
    group.add_argument("--max-response-len", type=int, help=f"in tokens (default: {SPECIFICATION.max_response_len})")
    group.add_argument("--temperature", type=finite, help=f"0: greedy (default: {SPECIFICATION.temperature:g})")
    group.add_argument("--top-p", type=finite, help=f"(default: {SPECIFICATION.top_p:g})")
    group.add_argument("--top-k", type=int, default=-1, help="-1: all tokens (default)")
    group.add_argument("--profile", choices=tuple(PROFILES), help="model-card: top-p 0.95, up to 131,072 tokens")
    group.add_argument("--seed", type=int, default=1234)


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--save", type=Path, help="directory of the result (default: runs/eval-NAME_OF_DATA)")
    group.add_argument("--concurrency", type=int, default=64, help="responses under way (default: %(default)s)")
    group.add_argument("--request-timeout-s", type=finite, help="for one response (default: by its longest)")
    group.add_argument("--max-retries", type=int, default=3, help="of a failed request (default: %(default)s)")
    group.add_argument(
        "--max-failures", type=int, default=16, help="samples that fail for good before all stop (default: %(default)s)"
    )
    group.add_argument(
        "--health-timeout-s", type=finite, default=120.0, help="without a healthy server before all stop (%(default)g)"
    )
    group.add_argument(
        "--stall-timeout-s", type=finite, help="without a finished sample before all stop (default: one request and 60)"
    )
    group.add_argument("--grade-timeout-s", type=finite, default=5.0, help="to compare two answers")


def _fill_in(arguments: argparse.Namespace) -> None:
    profile = SPECIFICATION if arguments.profile is None else PROFILES[arguments.profile]
    for name in ("max_response_len", "temperature", "top_p"):
        given, meant = getattr(arguments, name), getattr(profile, name)
        if given is None:
            setattr(arguments, name, meant)
        elif arguments.profile is not None and given != meant:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given} contradicts --profile {arguments.profile}, which means {meant}: drop one")
    if arguments.save is None:
        arguments.save = Path("runs") / f"eval-{arguments.data.stem}"


def _check(arguments: argparse.Namespace) -> None:
    for name in (
        *("n_samples", "max_response_len", "context_length", "concurrency", "max_failures"),
        *("request_timeout_s", "health_timeout_s", "stall_timeout_s"),
    ):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0")
    check_grading_time("--grade-timeout-s", arguments.grade_timeout_s)
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1 or not (arguments.top_k == -1 or arguments.top_k > 0):
        raise UserError("--temperature must be at least 0, --top-p in (0, 1], --top-k -1 or positive")
    if arguments.max_retries < 0:
        raise UserError("--max-retries must be at least 0")
    if arguments.url is not None and arguments.engine_args:
        raise UserError("--engine-args says nothing beside --url, whose server is running: drop one")
    engine_args(arguments)
    if arguments.model is not None and arguments.hf_checkpoint is not None:
        raise UserError("--hf-checkpoint says nothing beside --model: drop one")
