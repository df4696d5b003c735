"""The parts of a run, started in order and ended in the opposite one."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from rich.console import Console

from recipe.assembly.inputs import Data
from recipe.assembly.rollout_engines import RolloutEngines
from recipe.assembly.run import Run
from recipe.cluster import EngineGroup, TrainerGroup, place, ray_session
from recipe.config import Config, Resolved
from recipe.engines.argument_check import ArgumentCheck
from recipe.messages import Progress
from recipe.plan.memory import object_store_bytes
from recipe.plan.plan import Plan
from recipe.plan.report import as_json
from recipe.rewards.grader import Grader
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.run.directory import RunDirectory
from recipe.run.progress import open_progress
from recipe.run.spending import Budget
from recipe.run.start import StartClock, StartMoment, StartPart
from recipe.run.status import RunState
from recipe.sampling.routing import RouterShape


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
                    RouterShape.of(resolved.architecture) if config.grpo.replays_rollouts else None,
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
