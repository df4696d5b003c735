"""A run under way: its parts, and its books between the steps."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ParamSpec, cast

from recipe.assembly.inputs import Data
from recipe.assembly.rollout_engines import RolloutEngines, rollout_seeds
from recipe.cluster import TrainerGroup
from recipe.config import Resolved
from recipe.data.source import SourceState
from recipe.experience import from_prompts, rollout_metrics, sample_records, samples_of, shown_tokens, train_metrics
from recipe.grpo.mismatch import MismatchWatch, StepMismatch
from recipe.messages import Evaluated, FloatArray, Progress, StepReport, TrainSample
from recipe.rollout.ahead import put_back
from recipe.rollout.generate import Rollout
from recipe.run.conditions import Conditions
from recipe.run.directory import RunDirectory
from recipe.run.kept_steps import kept_step
from recipe.run.metrics import Scalar, StepMetrics
from recipe.run.phases import Phase, PhaseClock
from recipe.run.progress import Progress as Display
from recipe.run.spending import Budget, check_gain
from recipe.run.start import StartClock, StartMoment, StartPart
from recipe.run.status import RunState
from recipe.system.errors import UserError
from recipe.system.shutdown import OnFailure
from recipe.system.threads import to_its_end

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class Run:
    """A run under way: its parts, and what happened since the last recorded step."""

    def __init__(
        self,
        resolved: Resolved,
        data: Data,
        trainer: TrainerGroup,
        engines: RolloutEngines | None,
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
        done, samples, rollout = self.progress.rollouts, self._learned, self._rollout
        reports, evaluated = self._reports, self._evals
        # First: what fails here is not recorded again when what is learned is saved.
        self._rollout, self._reports, self._learned, self._evals = None, [], (), {}
        values: dict[str, Scalar] = {}
        if rollout is not None:
            assert self._engines is not None
            values |= rollout_metrics(done - 1, rollout, self._engines.new_counts())
            shown = shown_tokens(rollout, samples, _shown_log_probs(reports), self._data.decode_pieces)
            self._directory.record_rollout(done - 1, sample_records(rollout, self.config), shown)
            if self._begins_at_checkpoint:
                versions = [sample.weight_versions for sample in samples_of(rollout)]
                of_engine = self.config.grpo.replays_rollouts
                self._directory.keep_step(done, kept_step(samples, versions, of_engine=of_engine))
        if samples:
            values |= train_metrics(samples, reports, self.progress.skipped_steps)
        if self._engines is not None:
            values["weight_bytes_per_second"] = self._engines.weight_bytes_per_second
            values["seconds_paused"] = self._engines.seconds_paused
            values["seconds_engines_idle"] = self._engines.new_idle_seconds()
        self._directory.record_evaluation(done, evaluated)
        evals = {name: found.values for name, found in evaluated.items()}
        metrics = StepMetrics(step=done, values=values, evals=evals, seconds=self.clock.lap())
        conditions = Conditions.here(done, () if rollout is None else rollout.metrics.course)
        self._directory.record_conditions(conditions)
        self._directory.record(metrics)
        self._display.step(metrics)
        line = metrics.as_line()
        self._budget.take(line)
        for advice in self._adviser.take(line, conditions):
            logger.warning("step %d: %s (%s; %s)", done, advice.sentence, advice.reason, advice.page)
        replays_engine = self.config.grpo.replays_rollouts
        if (mismatch := StepMismatch.of(reports, replays_engine=replays_engine)) is not None:
            for sentence in self._mismatch.warnings(mismatch):
                logger.warning("step %d: %s", done, sentence)

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

    def _save(self, *, beside_others: bool = False) -> None:
        self._saved_rollouts = self.progress.rollouts
        with self.clock.measure(Phase.SAVE):
            self.trainer.save(self.config.save_dir, self.progress, beside_others=beside_others)
            self._try_to_write_down("the memory of the ranks", self._record_host_memory)
            if (target := self.config.checkpoint.hugging_face_target(self.progress.rollouts, self.is_over)) is not None:
                self._directory.claim_export(target)
                self.trainer.export_hugging_face(target)

    def _record_host_memory(self) -> None:
        self._directory.record_host_memory(self.trainer.host_memory())

    @property
    def on_failure(self) -> OnFailure:
        """What is done where the run fails: a checkpoint of what is learned, for which none of the older ones goes,
        since what made the run fail may be in it already."""
        limit_s = 60 * self.config.cluster.distributed_timeout_minutes
        save = partial(self.save_what_is_done, beside_others=True)
        return OnFailure(self._has_unsaved_steps, save, limit_s, "--distributed-timeout-minutes")

    def _has_unsaved_steps(self) -> bool:
        """Whether rollouts are learned that no checkpoint holds, and the trainer can still save them: none of its calls
        has failed, and it has taken no step of the next rollout."""
        is_half_learned = bool(self._reports) and not self._learned
        return self.trainer.is_well and not is_half_learned and self.progress.rollouts > self._saved_rollouts

    def save_what_is_done(self, *, beside_others: bool = False) -> None:
        """Leaves a checkpoint of the last finished rollout, for a run that ends early, also if that cannot be written
        down; older ones go by `--save-keep`, or stay `beside_others`. What is under way of the next rollouts is
        given up, and so are an evaluation and the engines: no rank is to wait for one that hangs."""
        if self._engines is not None:
            self._engines.begin_end()
        if self._learned:
            self._try_to_write_down(f"step {self.progress.rollouts}", self.record)
        if self.progress.rollouts > self._saved_rollouts:
            self._note_what_is_ahead()
            self._save(beside_others=beside_others)
        self.finish_save()

    @staticmethod
    def _try_to_write_down(what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            logger.warning("%s is not written down (%s)", what, str(error) or type(error).__name__)

    def finish_save(self) -> None:
        """Waits for a checkpoint that is still being written. Raises UserError if it cannot be."""
        with self.clock.measure(Phase.SAVE):
            self.trainer.finish_save()


def _shown_log_probs(reports: Sequence[StepReport]) -> Mapping[int, FloatArray]:
    """What the trainer gave the samples that are shown, each in the optimizer step that it was in; where a rollout has
    several, the later ones are of another policy."""
    return reports[0].shown_log_probs if len(reports) == 1 else {}
