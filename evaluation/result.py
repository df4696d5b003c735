"""result.json: what an evaluation came to, and everything that it depends on. It holds no times: the same settings and
responses give the same file.

python -m evaluation.result      prints its JSON schema, with a description of every field
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from evaluation.grading import Verdict
from recipe.sampling.sample import FinishReason
from recipe.system.errors import UserError
from recipe.system.json_text import parse_json

SCHEMA_VERSION = 2
RESULT = "result.json"
_LARGEST_RESULT = 256 << 20
"""In bytes: about a million samples. All of it is read at once."""
MODEL_CARD_RESPONSE_LEN = 131_072
"""Longest response, in tokens, of the scores that the model card of GLM-4.7-Flash gives for AIME."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Interval(_Part):
    mean: float
    ci95: tuple[float, float]
    """The 95% confidence interval, clustered by problem."""


class Tokens(_Part):
    """Lengths of responses in tokens."""

    mean: float
    p50: float
    p99: float
    max: int


class Score(_Part):
    """All samples of all problems together. Shares are between 0 and 1."""

    problems: int
    samples: int
    """Responses to all problems together."""
    avg_at_n: Interval
    """Share of correct samples, every problem counted alike; the interval is closed form, and allows for a
    problem unlike those seen (`recipe.run.statistics.clustered_share`)."""
    avg_at_n_bootstrap: Interval
    """The score with the interval of a Bayesian bootstrap over problems, as a check."""
    pass_at: dict[int, Interval]
    """By k: the probability that one of k samples is correct (unbiased, arXiv:2107.03374)."""
    maj_at: dict[int, Interval]
    """By k: the probability that the commonest answer of k samples is correct, ties drawn for."""
    verdicts: dict[Verdict, int]
    """Samples by verdict."""
    truncated_share: float
    """Samples that the engine cut off at the longest response, whether or not they had an answer by then."""
    no_answer_share: float
    """Samples that ended by themselves and have no answer: extraction failures."""
    grader_failed_share: float
    """Samples that could not be graded; they count as not correct."""
    tokens: Tokens


class SampleResult(_Part):
    sample: int
    """Its number among the problem's, from 0."""
    seed: int
    verdict: Verdict
    answer: str | None
    """The content of the box that counts."""
    reason: str
    finish_reason: FinishReason
    tokens: int


class ProblemResult(_Part):
    id: str
    label: str
    prompt: str
    """Exactly what the model read."""
    prompt_sha256: str
    correct_share: float
    majority: str | None
    """The commonest answer; None if no sample has one."""
    mean_tokens: float
    samples: tuple[SampleResult, ...]


class SamplingSettings(_Part):
    n_samples: int
    """Responses to each problem."""
    max_response_len: int
    """In tokens."""
    temperature: float
    top_p: float
    top_k: int
    """-1: all tokens."""
    seed: int
    """The seeds of all samples are derived from it."""


class Settings(_Part):
    """What the responses depend on. A directory holds the samples of one settings alone."""

    model: str
    """The directory, or what the server says of itself."""
    model_sha256: str
    """Digest of all files of the model or checkpoint; for a server, of what it says of its model, and of that model's
    files where they are on this machine."""
    engine: str
    """sglang or embedded, started for this evaluation; server: one that was running."""
    engine_args: tuple[str, ...]
    """Given to the engine besides its own."""
    data: str
    """Name of the file."""
    data_sha256: str
    instruction: str
    """Added to questions that do not ask for a box themselves."""
    prompts_sha256: str
    """Digest of all prompts as the model reads them, and their labels."""
    profile: str | None
    context_length: int
    """Longest prompt and response together, in tokens."""
    sampling: SamplingSettings


class Result(_Part):
    schema_version: int = SCHEMA_VERSION
    settings: Settings
    notes: tuple[str, ...]
    """What a reader must know before comparing the score with another."""
    score: Score
    problems: tuple[ProblemResult, ...]


def read_result(path: Path) -> Result:
    """The result in a file, or in a directory of `evaluation.aime`. Raises UserError if there is none."""
    file = path / RESULT if path.is_dir() else path
    try:
        size = file.stat().st_size
        if size > _LARGEST_RESULT:
            raise UserError(f"{file} is no result of evaluation.aime: it has {size / 1e9:,.1f} GB, so give result.json")
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{file} is no result of evaluation.aime of schema version {SCHEMA_VERSION}")
    try:
        return Result.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def score_notes(settings: Settings, truncated_share: float, grader_failed: int) -> tuple[str, ...]:
    """What a reader must know before comparing."""
    notes = []
    longest = settings.sampling.max_response_len
    if longest < MODEL_CARD_RESPONSE_LEN:
        notes.append(
            f"Responses had at most {longest:,} tokens ({truncated_share:.1%} of them were cut off): this score is not "
            f"comparable with one taken at {MODEL_CARD_RESPONSE_LEN:,} tokens, such as the model card's."
        )
    if grader_failed:
        notes.append(f"Samples that could not be graded, and count as not correct: {grader_failed}.")
    return tuple(notes)


def main() -> None:
    print(json.dumps(Result.model_json_schema(), indent=1))


if __name__ == "__main__":
    main()
