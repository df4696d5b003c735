"""The parts of a run, started in order and ended in the opposite one, and its books between the steps."""

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, cast

from rich.console import Console

from recipe.cluster import EngineGroup, TrainerGroup, place, ray_session
from recipe.config import Config, Resolved
from recipe.data.source import SourceState
from recipe.engines.argument_check import ArgumentCheck
from recipe.experience import (
    from_prompts,
    rollout_metrics,
    sample_records,
    samples_of,
    shown_tokens,
    train_metrics,
)
from recipe.grpo.mismatch import MismatchWatch, StepMismatch
from recipe.inputs import Data
from recipe.messages import Evaluated, FloatArray, Progress, StepReport, TrainSample
from recipe.plan.memory import object_store_bytes
from recipe.plan.plan import Plan
from recipe.plan.report import as_json
from recipe.rewards.grader import Grader
from recipe.rollout.admission import Admission
from recipe.rollout.ahead import Ahead, FirstFinished, FixedOrder, put_back
from recipe.rollout.client import ClientCounters, ClientOptions, RolloutClient
from recipe.rollout.collect import CollectionPlan, NothingToLearn, RolloutCollector
from recipe.rollout.generate import Rollout, SeedStream
from recipe.rollout.routing import RouterShape
from recipe.rollout.sample import SampleGroup, grade_group
from recipe.rollout.sampling_params import SamplingParams
from recipe.run.conditions import Conditions
from recipe.run.directory import RunDirectory
from recipe.run.kept_steps import kept_step
from recipe.run.metrics import Scalar, StepMetrics
from recipe.run.phases import Phase, PhaseClock
from recipe.run.progress import Progress as Display
from recipe.run.progress import open_progress
from recipe.run.spending import Budget, check_gain
from recipe.run.start import StartClock, StartMoment, StartPart
from recipe.run.status import RunState
from recipe.system.errors import UserError
from recipe.system.threads import in_thread, to_its_end

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class Run:
    """A run under way: its parts, and what happened since the last recorded step."""

    def __init__(
        self,
        resolved: Resolved,
        data: Data,
        trainer: TrainerGroup,
        engines: "RolloutEngines | None",
        directory: RunDirectory,
        budget: Budget,
        display: Display,
        progress: Progress,
        start: StartClock,
    ) -> None:
        self.config = resolved.config
        self.prompts = data.source
        self.trainer = trainer
        self.progress = progress
        self.clock = PhaseClock(self._enter)
        self._data, self._engines, self._directory, self._display = data, engines, directory, display
        self._rollout: Rollout | None = None
        self._reports: list[StepReport] = []
        self._learned: Sequence[TrainSample] = ()
        self._saved_rollouts = progress.rollouts
        self._begins_at_checkpoint = False
        self._start = start
        self._evals: dict[str, Evaluated] = {}
        self._mismatch = MismatchWatch(resolved.config.misc.mismatch_warn)
        self._budget = budget
        self._adviser = directory.adviser()
        if progress.rollouts:
            self.prompts.load_state_dict(cast(SourceState, progress.data))
            if engines is not None and engines.ahead is not None:
                self.prompts.put_back(group["index"] for group in progress.waiting)
                engines.ahead.load_state(progress.ahead)
            else:
                put_back(self.prompts, progress.ahead)
                if engines is not None:
                    engines.collector.load_state(progress.waiting)

    def _enter(self, phase: Phase) -> None:
        self._display.enter(phase)
        self._directory.status.tell(RunState.SAVING if phase is Phase.SAVE else RunState.RUNNING, phase)

    def given_responses(self) -> list[TrainSample]:
        """The next prompts with the responses of their file, for supervised training."""
        return from_prompts(self.prompts.draw(self.config.rollout.rollout_batch_size))

    async def generate(self) -> Rollout:
        """Samples and grades responses to the next prompts, under the current weights; with `--async-rollout` waits for
        those that are under way, and goes on making others."""
        engines, rollout_id = self._engines, self.progress.rollouts
        self._begins_at_checkpoint = self._saved_rollouts == rollout_id
        assert engines is not None
        with self.clock.measure(Phase.ROLLOUT), engines.telling_of_graders():
            if engines.ahead is not None:
                self._rollout = await engines.ahead.next()
            else:
                seeds = rollout_seeds(self.config.misc.seed, rollout_id)
                self._rollout = await engines.collector.collect(seeds, str(rollout_id))
            await engines.release_memory()
        engines.check_grades()
        return self._rollout

    def generate_ahead(self) -> None:
        """With `--async-rollout`: lets generation go on that an update of the weights has paused."""
        if self._engines is not None and self._engines.ahead is not None:
            self._engines.ahead.go_on()

    async def beside_generation(self, learn: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        """Calls `learn`, which makes the weights of the next version; with `--async-rollout` in a thread of its own:
        who is cancelled meanwhile waits for its end."""
        if self._engines is None or self._engines.ahead is None:
            learn(*arguments, **named)
            return
        async with self._engines.changing(self.progress.rollouts + 1):
            await to_its_end(learn, *arguments, **named)

    async def update_weights(self) -> None:
        """Sends the policy to the engines; those that died meanwhile are replaced first. Raises UserError if one does
        not take it."""
        if self._engines is not None:
            if self._engines.waits_for_rollouts:
                with self.clock.measure(Phase.ROLLOUT), self._engines.telling_of_graders():
                    await self._engines.pause()
            with self.clock.measure(Phase.UPDATE_WEIGHTS):
                await self._engines.update_weights(self.trainer, self.progress.rollouts)
            self._start.end(StartPart.FIRST_WEIGHTS)
            self._start.reach(StartMoment.WEIGHTS)
            self.trainer.load_compiler()

    async def evaluate(self) -> None:
        """Scores the engines' weights on the held-out sets."""
        engines, evaluation = self._engines, self._data.evaluation
        if engines is None or evaluation is None:
            return
        with self.clock.measure(Phase.EVAL):
            self._evals = await evaluation.evaluate(
                engines.client, engines.grade, expected_version=str(self.progress.rollouts)
            )

    def count_step(self, report: StepReport) -> None:
        """Takes down an optimizer step. Raises UserError if too many were skipped in a row."""
        self._reports.append(report)
        before = self.progress
        skips = before.consecutive_skips + 1 if report.skipped else 0
        self.progress = replace(
            before,
            optimizer_steps=before.optimizer_steps + (not report.skipped),
            skipped_steps=before.skipped_steps + report.skipped,
            consecutive_skips=skips,
        )
        if skips >= self.config.optimizer.max_consecutive_skips:
            raise UserError(
                f"the gradients were not finite in {skips} optimizer steps in a row: the run has diverged; go back to "
                "the last checkpoint with --load, with a lower --lr or a smaller --clip-grad"
            )

    def finish_rollout(self, samples: Sequence[TrainSample]) -> None:
        """The samples of a rollout are learned: the policy is the next version."""
        self._learned = samples
        self.progress = replace(self.progress, rollouts=self.progress.rollouts + 1)
        if self._engines is not None and self._engines.ahead is not None:
            self._engines.ahead.trained()
            return  # what the checkpoint holds besides changes until it is written
        waiting = self._engines.collector.state() if self._engines is not None else []
        self.progress = replace(self.progress, data=dict(self.prompts.state_dict()), waiting=waiting, ahead=[])

    @property
    def is_over(self) -> bool:
        """Whether all rollouts are done."""
        return self.progress.rollouts >= self.config.rollout.num_rollout

    @property
    def is_first_evaluation_due(self) -> bool:
        """Whether the starting weights are to be scored."""
        evaluates = self._data.evaluation is not None and not self.config.eval.skip_eval_before_train
        return evaluates and self.progress.rollouts == 0

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the weights are to be scored now: every `--eval-interval` rollouts and after the last."""
        return self._is_due(self.config.eval.eval_interval)

    @property
    def is_save_due(self) -> bool:
        """Whether a checkpoint is to be written now: every `--save-interval` rollouts and after the last."""
        return self._is_due(self.config.checkpoint.save_interval)

    def _is_due(self, interval: int | None) -> bool:
        return self.is_over or (interval is not None and self.progress.rollouts % interval == 0)

    def record(self) -> None:
        """Writes the step's line and samples to the run directory, and shows it. Before the first step: only the
        evaluation."""
        done, samples = self.progress.rollouts, self._learned
        values: dict[str, Scalar] = {}
        if self._rollout is not None:
            assert self._engines is not None
            values |= rollout_metrics(done - 1, self._rollout, self._engines.new_counts())
            shown = shown_tokens(self._rollout, samples, self._shown_log_probs(), self._data.decode_pieces)
            self._directory.record_rollout(done - 1, sample_records(self._rollout, self.config), shown)
            if self._begins_at_checkpoint:
                versions = [sample.weight_versions for sample in samples_of(self._rollout)]
                of_engine = self.config.grpo.use_rollout_routing_replay
                self._directory.keep_step(done, kept_step(samples, versions, of_engine=of_engine))
        if samples:
            values |= train_metrics(samples, self._reports, self.progress.skipped_steps)
        if self._engines is not None:
            values["weight_bytes_per_second"] = self._engines.weight_bytes_per_second
            values["seconds_paused"] = self._engines.seconds_paused
            values["seconds_engines_idle"] = self._engines.new_idle_seconds()
        self._directory.record_evaluation(done, self._evals)
        evals = {name: found.values for name, found in self._evals.items()}
        metrics = StepMetrics(step=done, values=values, evals=evals, seconds=self.clock.lap())
        conditions = Conditions.here(done, () if self._rollout is None else self._rollout.metrics.course)
        self._directory.record_conditions(conditions)
        self._directory.record(metrics)
        self._display.step(metrics)
        line = metrics.as_line()
        self._budget.take(line)
        for advice in self._adviser.take(line, conditions):
            logger.warning("step %d: %s (%s; %s)", done, advice.sentence, advice.reason, advice.page)
        replays_engine = self.config.grpo.use_rollout_routing_replay
        if (mismatch := StepMismatch.of(self._reports, replays_engine=replays_engine)) is not None:
            for sentence in self._mismatch.warnings(mismatch):
                logger.warning("step %d: %s", done, sentence)
        self._rollout, self._reports, self._learned, self._evals = None, [], (), {}

    def _shown_log_probs(self) -> Mapping[int, FloatArray]:
        """What the trainer gave the samples that are shown, each in the optimizer step that it was in; where a rollout
        has several, the later ones are of another policy."""
        return self._reports[0].shown_log_probs if len(self._reports) == 1 else {}

    def stop_if_enough(self) -> None:
        """Before a step: raises Stopped if it would bring the run over a limit of time or money, or the last evaluation
        has shown what was to be shown."""
        self._budget.check()
        evals, done = self.config.eval.eval_prompt_data, self.progress.rollouts
        if evals and self._is_due(self.config.eval.eval_interval):
            check_gain(self.config.misc, self._directory.path, evals[0].name, done)

    async def save(self) -> None:
        """Writes a checkpoint that a resumed run goes on from, losing nothing, and what `--save-hf` asks for. With
        `--async-save` only begins to write the checkpoint, after the one before it is written."""
        self._note_what_is_ahead()
        if self._engines is None or self._engines.ahead is None:
            self._save()
        else:
            await to_its_end(self._save)

    def _note_what_is_ahead(self) -> None:
        if self._engines is not None and self._engines.ahead is not None:
            self.progress = replace(self.progress, waiting=[], **self._engines.ahead.state())

    def _save(self) -> None:
        self._saved_rollouts = self.progress.rollouts
        with self.clock.measure(Phase.SAVE):
            self.trainer.save(self.config.save_dir, self.progress)
            self._directory.record_host_memory(self.trainer.host_memory())
            if (target := self.config.checkpoint.hugging_face_target(self.progress.rollouts, self.is_over)) is not None:
                self._directory.claim_export(target)
                self.trainer.export_hugging_face(target)

    def save_what_is_done(self) -> None:
        """Leaves a checkpoint of the last finished rollout, for a run that ends early. What is under way of the next
        ones is given up, and so are an evaluation and the engines: no rank is to wait for one that hangs."""
        if self._engines is not None:
            self._engines.begin_end()
        if self._learned:
            self.record()
        if self.progress.rollouts > self._saved_rollouts:
            self._note_what_is_ahead()
            self._save()
        self.finish_save()

    def finish_save(self) -> None:
        """Waits for a checkpoint that is still being written. Raises UserError if it cannot be."""
        with self.clock.measure(Phase.SAVE):
            self.trainer.finish_save()


class RolloutEngines:
    """The rollout side: servers, the client that speaks to them, and the grader of what they say."""

    def __init__(
        self,
        group: EngineGroup,
        client: RolloutClient,
        grader: Grader | None,
        data: Data,
        config: Config,
        done: int,
    ) -> None:
        """`done`: rollouts that are trained."""
        self.client = client
        self._group, self._grader = group, grader
        self._told, self._idle_s = client.counters, client.course.idle_s
        plan, sampling = CollectionPlan.of(config.rollout), SamplingParams.for_rollout(config.rollout)
        self.collector = RolloutCollector(client, data.source, plan, sampling, grade=self.grade, keep=data.keep)
        self._updates_in_flight = config.rollout.update_weight_in_flight is not None
        self.ahead: Ahead | None = None
        """None: nothing is made while the trainer works."""
        if not plan.max_staleness:
            return
        seed, rollouts = config.misc.seed, config.rollout.num_rollout
        if config.rollout.is_in_fixed_order:
            admission = Admission(1, plan.max_staleness, rollouts=rollouts, done=done)
            self.ahead = FixedOrder(self.collector, data.source, plan, admission, partial(rollout_seeds, seed))
        else:
            admission = Admission(plan.groups, plan.max_staleness, rollouts=rollouts, done=done)
            seeds = SeedStream(seed, ("draw",))
            self.ahead = FirstFinished(
                client, data.source, plan, admission, sampling, seeds, grade=self.grade, keep=data.keep
            )

    async def grade(self, group: SampleGroup) -> None:
        """Grades every sample of a complete group."""
        await grade_group(self._grader, group)

    def check_grades(self) -> None:
        """Raises UserError if the grader has failed at every response since the last call."""
        if self._grader is not None:
            self._grader.collect_counts()

    @contextmanager
    def telling_of_graders(self) -> Iterator[None]:
        """A grader that always fails gives equal rewards too, and says so better."""
        try:
            yield
        except NothingToLearn:
            self.check_grades()
            raise

    def changing(self, version: int) -> AbstractAsyncContextManager[None]:
        """The trainer makes the weights of `version` in the block; see `EngineGroup`."""
        return self._group.changing(version)

    async def release_memory(self) -> None:
        """Nothing is generated until the next `update_weights`: engines on the trainer's GPUs make room for it."""
        await in_thread(self._group.release_memory)

    @property
    def waits_for_rollouts(self) -> bool:
        """Whether an update has to wait for what is made ahead: it takes no weights in flight."""
        return self.ahead is not None and not self._updates_in_flight

    async def pause(self) -> None:
        """Waits for what is under way; nothing more is started until the weights are there."""
        assert self.ahead is not None
        await self.ahead.pause()

    async def update_weights(self, trainer: TrainerGroup, version: int) -> None:
        """Sends the policy to all engines; those that do not generate any more are started again for it."""
        trainer.make_room()
        async with self.client.updating(str(version)):
            self.client.move(await in_thread(self._group.update_weights, trainer, version))
        if self.ahead is not None:
            self.ahead.advance(version)

    def begin_end(self) -> None:
        """Nothing is generated any more, and nobody waits for an engine."""
        self._group.begin_end()

    @property
    def weight_bytes_per_second(self) -> float | None:
        """Speed of the last update; see `EngineGroup`."""
        return self._group.weight_bytes_per_second

    @property
    def seconds_paused(self) -> float | None:
        """Time that generation stood still for the last update; see `EngineGroup`."""
        return self._group.seconds_paused

    def new_counts(self) -> ClientCounters:
        """What went wrong with engines and was mended since the last call."""
        before, self._told = self._told, self.client.counters
        return self._told - before

    def new_idle_seconds(self) -> float | None:
        """Time since the last call in which no sample was under way; None where they wait for the trainer anyway."""
        before, self._idle_s = self._idle_s, self.client.course.idle_s
        return None if self.ahead is None else self._idle_s - before


def rollout_seeds(seed: int, rollout_id: int) -> SeedStream:
    """The random stream of a rollout."""
    return SeedStream(seed, ("rollout", rollout_id))


@asynccontextmanager
async def open_run(resolved: Resolved, plan: Plan | None) -> AsyncIterator[Run]:
    """Starts Ray, the trainer's ranks and the engines, and reads the data meanwhile; when the block is left, for
    whatever reason, ends what was started and nothing else."""
    config, console = resolved.config, Console()
    clock = StartClock(lambda line: console.print(line, soft_wrap=True, highlight=False))
    clock.command_is_read()
    async with AsyncExitStack() as stack:
        arguments = stack.enter_context(ArgumentCheck(resolved))
        directory = stack.enter_context(RunDirectory(resolved))
        if plan is not None:
            directory.record_plan(as_json(plan, ()))
        directory.record_start(clock.seconds)
        budget = Budget(config.misc, lambda: directory.status.status, directory.lines())
        budget.check_start()
        clock.on_begin = lambda part: directory.status.tell(RunState.STARTING, part)
        with clock.measure(StartPart.RAY):
            stack.enter_context(ray_session(config, object_store_bytes(resolved)))
        placement = place(config)
        trainer = stack.enter_context(TrainerGroup(config, resolved.architecture, placement))
        group = stack.enter_context(EngineGroup(resolved, placement)) if config.needs_engine else None
        _begin_start(trainer, group, clock)
        with clock.measure(StartPart.DATA):
            data = Data.read(resolved)
        arguments.finish()
        grader = _open_grader(config, data, stack)
        progress, urls = _finish_start(trainer, group, clock)
        directory.start(progress.rollouts)
        directory.record_host_memory(trainer.host_memory())
        engines = None
        if group is not None:

            def on_answer(engine: int) -> None:
                clock.reach(StartMoment.ANSWER)
                group.on_answer(engine)

            client = RolloutClient(
                urls,
                ClientOptions.of(
                    config.rollout,
                    resolved.architecture.vocab_size,
                    RouterShape.of(resolved.architecture) if config.grpo.use_rollout_routing_replay else None,
                    data.generation,
                ),
                on_silent=group.on_silent,
                on_answer=on_answer,
            )
            engines = RolloutEngines(
                group, await stack.enter_async_context(client), grader, data, config, progress.rollouts
            )
            if engines.ahead is not None:
                await stack.enter_async_context(engines.ahead)
            clock.begin(StartPart.FIRST_WEIGHTS)
        display = stack.enter_context(open_progress(config.rollout.num_rollout, progress.rollouts, console))
        yield Run(resolved, data, trainer, engines, directory, budget, display, progress, clock)


def _begin_start(trainer: TrainerGroup, group: EngineGroup | None, clock: StartClock) -> None:
    if group is not None:  # first: they take longest
        clock.begin(StartPart.ENGINES)
        group.begin_start()
    clock.begin(StartPart.RANKS)
    trainer.begin_start()


def _finish_start(
    trainer: TrainerGroup, group: EngineGroup | None, clock: StartClock
) -> tuple[Progress, Sequence[str]]:
    """Waits for ranks and engines. Returns how far the run has come, and the engines' addresses. Raises UserError as
    soon as one of either fails."""

    def look_at_engines() -> None:
        if group is not None and group.have_started():
            clock.end(StartPart.ENGINES)

    started = trainer.finish_start(look_at_engines)
    clock.end(StartPart.RANKS, started.seconds)
    if group is None:
        return started.progress, []
    urls = group.finish_start()
    clock.end(StartPart.ENGINES)
    return started.progress, urls


def _open_grader(config: Config, data: Data, stack: AsyncExitStack) -> Grader | None:
    """What grades answers, which ends with `stack`; its processes start beside the engines. None: whoever generates
    gives the rewards, or nothing is generated."""
    if not config.needs_engine:
        return None
    settings, grader = config.rollout, None
    if data.reward is not None:
        grader = Grader(data.reward, timeout_s=settings.rm_timeout_s, num_workers=settings.rm_num_workers)
        stack.enter_context(grader).start()
    if data.evaluation is not None:
        stack.enter_context(data.evaluation)
    return grader
