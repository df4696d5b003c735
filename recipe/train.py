"""GRPO, from prompts to new weights: the loop of the whole recipe.

python -m recipe.train --recipe NAME [flags]            trains, if the run fits this machine (--force: in any case)
python -m recipe.train --replay-step RUN:N [flags]      does a step that a run kept again, with the flags changed
python -m recipe.train --recipe NAME [flags] --check    reads and checks everything as the run would, starts nothing
"""

import asyncio
import sys

from recipe.again.step import replay_step
from recipe.assembly import Data, Run, open_run
from recipe.config import Resolved, help_text, resolve
from recipe.config.usage import CHECK, FORCE, HELP, REPLAY_STEP
from recipe.engines.argument_check import check_arguments
from recipe.experience import optimizer_batches, with_advantages, with_log_probs
from recipe.messages import TrainSample
from recipe.plan.plan import Plan
from recipe.plan.preflight import preflight
from recipe.run.outputs import check_outputs
from recipe.run.phases import Phase
from recipe.system.errors import run_main
from recipe.system.shutdown import safe_point, saving_on_notice
from recipe.weights.checkpoints import find_start, rollouts_in


async def train(resolved: Resolved, plan: Plan | None) -> None:
    """Carries out the run that `resolved` describes, from its beginning or from the checkpoint in `--load`. A SIGTERM
    that comes between two steps, or while one samples or sends weights, ends it there, saved; so does a failure that is
    not the trainer's, which is raised then."""
    config = resolved.config
    async with open_run(resolved, plan) as run:
        with saving_on_notice(run.save_what_is_done, config.misc.sigterm_grace_s, run.on_failure):
            await run.update_weights()
            if run.is_first_evaluation_due:
                await run.evaluate()
                run.record()
            while not run.is_over:
                await safe_point()
                run.stop_if_enough()
                if config.is_sft:
                    samples = run.given_responses()
                else:
                    rollout = await run.generate()
                    samples = with_advantages(rollout, config)
                await run.beside_generation(learn, run, samples)
                await run.update_weights()
                if run.is_evaluation_due:
                    await run.evaluate()
                run.generate_ahead()
                run.record()
                if run.is_save_due:
                    await run.save()
            run.finish_save()
            await safe_point()


def learn(run: Run, samples: list[TrainSample]) -> None:
    """The optimizer steps of one rollout. Passes whose result cannot matter are not run: with one step a rollout the
    ratio to the old policy is 1, and without a KL term there is no reference model."""
    config, trainer = run.config, run.trainer
    with run.clock.measure(Phase.LOG_PROBS):
        old = trainer.log_probs(samples) if config.needs_old_log_probs else None
        reference = trainer.log_probs(samples, of_reference=True) if config.needs_reference else None
    samples = with_log_probs(samples, old, reference, config.grpo)
    with run.clock.measure(Phase.TRAIN):
        for batch in optimizer_batches(samples, config):
            run.count_step(trainer.train_step(batch))
    run.finish_rollout(samples)


def main() -> None:
    arguments = sys.argv[1:]
    if not HELP.isdisjoint(arguments):
        print(help_text())
        return
    if REPLAY_STEP in arguments:
        print("\n".join(replay_step(arguments)))
        return
    resolved = resolve([word for word in arguments if word not in (CHECK, FORCE)])
    start = find_start(resolved.config)
    check_outputs(resolved.config)
    if CHECK in arguments:
        check_arguments(resolved)
        Data.read(resolved)
        print(resolved.describe())
        return
    for note in filter(None, (*resolved.notes, start.note)):
        print(f"note: {note}")
    if start.checkpoint is not None and (done := rollouts_in(start.checkpoint)) >= resolved.config.rollout.num_rollout:
        print(f"nothing to do: {start.checkpoint} has all of its {done} rollouts; to go on, raise --num-rollout")
        return
    plan = preflight(resolved, force=FORCE in arguments)
    asyncio.run(train(resolved, plan))


if __name__ == "__main__":
    run_main(main)
