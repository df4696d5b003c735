"""Rules of rollouts that are made while the trainer works. Each yields a sentence for what it refuses."""

from collections.abc import Iterator

from recipe.config.architecture import Architecture
from recipe.config.schema import Config


def details_need_async_rollout(config: Config, _: Architecture) -> Iterator[str]:
    """Flags that would be ignored."""
    rollout = config.rollout
    bound = {"--max-staleness": rollout.max_staleness}
    ahead = {"--async-order": rollout.async_order, "--update-weight-in-flight": rollout.update_weight_in_flight}
    if not rollout.async_rollout:
        given = {flag: value for flag, value in {**bound, **ahead}.items() if value is not None}
        yield from (f"{flag} {value} has no effect without --async-rollout" for flag, value in given.items())
    elif rollout.staleness == 0:
        given = {flag: value for flag, value in ahead.items() if value is not None}
        for flag, value in given.items():
            yield f"{flag} {value} has no effect with --max-staleness 0: nothing is generated ahead"


def generation_goes_on_beside_training(config: Config, _: Architecture) -> Iterator[str]:
    """Something is generated, where the trainer is not."""
    if not config.rollout.async_rollout:
        return
    if config.is_sft:
        yield "--async-rollout: --loss-type sft learns given responses, and nothing is generated; drop it"
    if config.cluster.colocate:
        yield (
            "--async-rollout with --colocate: engines on the trainer's GPUs cannot generate while it works; give "
            "--rollout-num-gpus N, for engines with GPUs of their own, and --no-colocate"
        )


def older_tokens_have_a_bound(config: Config, _: Architecture) -> Iterator[str]:
    """What keeps tokens longer than --max-staleness, or has no meaning where nobody waits for the longest response."""
    rollout = config.rollout
    if not rollout.async_rollout or rollout.staleness == 0:
        return
    if rollout.partial_rollout:
        yield (
            "--partial-rollout with --async-rollout: aborted samples would have tokens beyond --max-staleness; drop "
            "it: with --async-order finished nobody waits for the longest responses"
        )
    elif rollout.draw_size != rollout.rollout_batch_size:
        yield (
            "--over-sampling-batch-size with --async-rollout: what is aborted would be made for nothing; drop it: with "
            "--async-order finished nobody waits for the longest responses"
        )
    if rollout.update_weight_in_flight is not None and rollout.is_in_fixed_order:
        yield (
            "--update-weight-in-flight with --async-order fixed, which makes each rollout under the weights of one "
            "version: give --async-order finished, or drop it"
        )


RULES = (details_need_async_rollout, generation_goes_on_beside_training, older_tokens_have_a_bound)
