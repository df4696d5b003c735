"""Scores a model on AIME: --n-samples responses to every problem, graded, with intervals and a report.

python -m evaluation.aime --model DIR --data FILE                                  starts an engine
python -m evaluation.aime --checkpoint TORCH_DIST --data FILE                      exports it first
python -m evaluation.aime --url http://127.0.0.1:30000 --data FILE                 uses a running server

The directory --save gets samples.jsonl (every finished sample, at once), result.json (its schema:
python -m evaluation.result) and report.html. The same command run again makes only what is missing.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaluation.directory import EvaluationDirectory
from evaluation.grading import Judge, Judgement, Response
from evaluation.identity import (
    Identity,
    identity_of_checkpoint,
    identity_of_directory,
    identity_of_server,
    newest_checkpoint,
    origin_of,
)
from evaluation.options import engine_args, limits_of, parse, request_timeout_s, sampling_params
from evaluation.problems import ProblemFile, digest, read_problems
from evaluation.progress import EvaluationProgress
from evaluation.result import Result, SamplingSettings, Settings
from evaluation.sampling import Plan, SampleKey, StoredSample, generate_missing
from evaluation.scoring import result_of
from evaluation.served import context_length_of, engine_kind, engine_launch, export_checkpoint, running_engine
from recipe.data.prompts import Prompt
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.rollout.generate import SeedStream
from recipe.system.errors import UserError, run_main
from recipe.system.files import sha256_file


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    identity: Identity
    tokenizer: Path
    """Directory of tokenizer and configuration."""
    engine: str
    """See `evaluation.result.Settings.engine`."""
    checkpoint: Path | None = None
    """What is exported first: one checkpoint, however many a training run adds meanwhile."""


def open_subject(arguments: argparse.Namespace) -> Subject:
    """Looks at the model, checkpoint or server. Raises UserError if it is not there."""
    if arguments.url is not None:
        identity, own_tokenizer = identity_of_server(arguments.url)
        tokenizer = arguments.hf_checkpoint or own_tokenizer
        if tokenizer is None:
            raise UserError(f"the tokenizer of {identity.name} is not on this machine: give --hf-checkpoint")
        return Subject(identity, tokenizer, "server")
    engine = engine_kind(arguments.engine)
    if arguments.checkpoint is not None:
        checkpoint = newest_checkpoint(arguments.checkpoint)
        origin = arguments.hf_checkpoint or origin_of(checkpoint)
        return Subject(identity_of_checkpoint(checkpoint, origin), origin, engine, checkpoint)
    return Subject(identity_of_directory(arguments.model), arguments.model, engine)


def settings_of(
    arguments: argparse.Namespace, subject: Subject, problems: Sequence[Prompt], context_length: int
) -> Settings:
    """Everything that the responses depend on."""
    return Settings(
        model=subject.identity.name,
        model_sha256=subject.identity.sha256,
        engine=subject.engine,
        engine_args=engine_args(arguments),
        data=arguments.data.name,
        data_sha256=sha256_file(arguments.data),
        instruction=arguments.instruction,
        prompts_sha256=digest(problems),
        profile=arguments.profile,
        context_length=context_length,
        sampling=SamplingSettings(
            n_samples=arguments.n_samples,
            max_response_len=arguments.max_response_len,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
        ),
    )


class Evaluation:
    """An evaluation under way: what was planned, what there is, and what was judged of it."""

    def __init__(
        self, arguments: argparse.Namespace, subject: Subject, problems: Sequence[Prompt], settings: Settings
    ) -> None:
        is_chosen = subject.checkpoint is not None and subject.checkpoint != arguments.checkpoint
        self.directory = EvaluationDirectory(arguments.save, settings, arguments.checkpoint if is_chosen else None)
        self._arguments, self._subject, self._settings = arguments, subject, settings
        seeds = SeedStream(arguments.seed, ("eval", arguments.data.stem))
        self.plan = Plan(problems, arguments.n_samples, sampling_params(arguments), seeds)
        self._problems = {problem.name: problem for problem in problems}
        self._judgements: dict[SampleKey, Judgement] = {}
        self._progress = EvaluationProgress(len(problems) * arguments.n_samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets another command into the directory."""
        self.directory.__exit__()

    def complete(self) -> Result:
        """Generates what is missing, and judges everything. Raises UserError, and keeps what it has, if it cannot."""
        with Judge(timeout_s=self._arguments.grade_timeout_s) as judge:
            stored = list(self.directory.store.samples.values())
            judgements = judge.judge([self._response(sample) for sample in stored])
            for sample, judgement in zip(stored, judgements, strict=True):
                self._note(sample, judgement, is_new=False)
            if any(self.plan.missing(self.directory.store)):
                with self._server() as url:
                    asyncio.run(self._generate(url, judge))
        return result_of(self._settings, self.plan, self.directory.store, self._judgements)

    async def _generate(self, url: str, judge: Judge) -> None:
        arguments, store = self._arguments, self.directory.store

        async def on_sample(sample: StoredSample) -> None:
            [judgement] = await judge.judge_async([self._response(sample)])
            self._note(sample, judgement, is_new=True)

        options = ClientOptions(arguments.concurrency, request_timeout_s(arguments), arguments.max_retries)
        stored = len(store.samples)
        version = self._subject.identity.version
        self._progress.begin()
        async with RolloutClient([url], options) as client:
            try:
                await generate_missing(
                    client, self.plan, store, on_sample, version=version, limits=limits_of(arguments)
                )
            finally:
                self.directory.record_session(len(store.samples) - stored, client.counters.retries)

    @contextmanager
    def _server(self) -> Iterator[str]:
        """The address of what generates: the running server, or an engine that lives as long as the block."""
        arguments, model = self._arguments, self._arguments.model
        if arguments.url is not None:
            yield arguments.url
            return
        if model is None:
            model = self.directory.exported
            assert self._subject.checkpoint is not None
            export_checkpoint(self._subject.checkpoint, self._subject.tokenizer, model)
        context_length, words = self._settings.context_length, self._settings.engine_args
        launch = engine_launch(arguments.engine, model, words, context_length, arguments.seed)
        with running_engine(launch, self.directory.engine_log) as url:
            yield url

    def _response(self, sample: StoredSample) -> Response:
        problem = self._problems.get(sample.problem)
        if problem is None:
            raise UserError(
                f"samples.jsonl has a sample of a problem {sample.problem!r} that is not asked; remove the line"
            )
        return Response(sample.response, problem.label, sample.truncated, problem.text)

    def _note(self, sample: StoredSample, judgement: Judgement, *, is_new: bool) -> None:
        self._judgements[sample.key] = judgement
        self._progress.add(sample.problem, judgement.verdict, sample.tokens, truncated=sample.truncated, is_new=is_new)


def open_evaluation(arguments: argparse.Namespace) -> Evaluation:
    """Reads and checks everything before anything is started. Raises UserError for what is wrong."""
    subject = open_subject(arguments)
    context_length = arguments.context_length or context_length_of(subject.tokenizer)
    room = context_length - arguments.max_response_len
    if room <= 0:
        raise UserError(
            f"--max-response-len {arguments.max_response_len} leaves no room for a prompt in a context of "
            f"{context_length} tokens"
        )
    file = ProblemFile(
        arguments.data, arguments.input_key, arguments.label_key, arguments.id_key, arguments.instruction
    )
    problems = read_problems(file, subject.tokenizer, max_tokens=room)
    return Evaluation(arguments, subject, problems, settings_of(arguments, subject, problems, context_length))


def describe(result: Result) -> str:
    """The score in a few lines."""
    found, n = result.score, result.settings.sampling.n_samples
    low, high = found.avg_at_n.ci95
    lines = [
        f"avg@{n} {found.avg_at_n.mean:.1%} (95% interval {low:.1%} to {high:.1%}, {found.problems} problems)",
        f"pass@{n} {found.pass_at[n].mean:.1%}, maj@{n} {found.maj_at[n].mean:.1%}",
        f"cut off {found.truncated_share:.1%}, no answer {found.no_answer_share:.1%}, "
        f"grader failed {found.grader_failed_share:.1%}",
        f"tokens: mean {found.tokens.mean:,.0f}, p50 {found.tokens.p50:,.0f}, p99 {found.tokens.p99:,.0f}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def main() -> None:
    with open_evaluation(parse(__doc__)) as evaluation:
        result = evaluation.complete()
        report = evaluation.directory.finish(result)
    print(describe(result))
    print(f"report: {report}")


if __name__ == "__main__":
    run_main(main)
