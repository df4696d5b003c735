"""What a valid configuration means that its author may not expect: passes that are skipped, flags without effect."""

from collections.abc import Iterator

from recipe.config import sglang_rules
from recipe.config.architecture import Architecture
from recipe.config.schema import Config


def notes_of(config: Config, architecture: Architecture) -> tuple[str, ...]:
    """The notes on `config`, a sentence each."""
    return (
        *_skipped_passes(config),
        *_sampling(config),
        *_mtp(config, architecture),
        *_trainer(config),
        *_engine(config),
    )


def _skipped_passes(config: Config) -> Iterator[str]:
    grpo = config.grpo
    if config.eval.eval_interval is not None and not config.eval.eval_prompt_data and not config.is_sft:
        yield "nothing is evaluated: --eval-interval has no effect without --eval-prompt-data NAME PATH"
    if config.is_sft:
        yield "sft: no rollouts and no rewards; the responses come from the prompt file"
        return
    if grpo.use_kl_loss and grpo.kl_loss_coef == 0:
        yield "the reference model is not run: the KL coefficient is 0, so its log-probs would change nothing"
    if config.rollout.custom_rm_path is not None and config.rollout.rm_type is not None:
        yield f"--custom-rm-path {config.rollout.custom_rm_path} takes the place of --rm-type {config.rollout.rm_type}"
    if not config.needs_old_log_probs:
        yield (
            "no old-log-prob pass: with one optimizer step a rollout the policy has not moved, the ratio is 1 and "
            "clipping never bites"
        )
    if grpo.use_routing_replay and grpo.replays_rollouts:
        yield "--use-rollout-routing-replay takes the place of --use-routing-replay: all passes route as the engine did"


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if config.is_sft:
        return
    if rollout.staleness and not rollout.is_in_fixed_order:
        yield "the groups that finish first are trained first: two runs of one seed differ; --async-order fixed repeats"
    if rollout.staleness and not (config.grpo.use_tis or config.grpo.custom_tis_function_path):
        yield "tokens of older weights are learned from as if the current ones had made them; --use-tis weighs them"
    if not rollout.keeps_in_order:
        yield (
            "the first groups to finish are kept, so two runs of one seed differ; without --over-sampling-batch-size "
            "and --partial-rollout groups are kept in the order of their prompts"
        )
    if rollout.partial_rollout:
        if rollout.draw_size == rollout.rollout_batch_size and rollout.dynamic_sampling_filter_path is None:
            yield (
                "--partial-rollout has no effect: nothing is aborted without --over-sampling-batch-size above "
                f"{rollout.rollout_batch_size} or --dynamic-sampling-filter-path"
            )
        elif not (config.grpo.use_tis or rollout.mask_offpolicy_in_partial_rollout):
            yield (
                "tokens that older weights made are learned from as if the current ones had made them; --use-tis "
                "weighs them, --mask-offpolicy-in-partial-rollout leaves them out"
            )


def _mtp(config: Config, architecture: Architecture) -> Iterator[str]:
    held = architecture.num_nextn_predict_layers
    if held and not config.mtp.mtp_num_layers:
        yield f"the checkpoint's MTP layer is not loaded into the trainer; --mtp-num-layers {held} loads it"


def _trainer(config: Config) -> Iterator[str]:
    perf = config.perf
    if perf.sequence_parallel and perf.tensor_model_parallel_size == 1:
        yield "--sequence-parallel has no effect with --tensor-model-parallel-size 1"
    if perf.max_tokens_per_gpu is not None:
        if not perf.use_dynamic_batch_size:
            yield "--max-tokens-per-gpu has no effect without --use-dynamic-batch-size"
        elif config.rollout.rollout_max_response_len >= perf.max_tokens_per_gpu * perf.context_parallel_size:
            yield (
                f"a sample may be longer than --max-tokens-per-gpu {perf.max_tokens_per_gpu} "
                "(times --context-parallel-size): it then has a microbatch of its own, which needs the memory for it"
            )
    if config.optimizer.lr_decay_iters is not None and config.optimizer.lr_decay_style == "constant":
        yield "--lr-decay-iters has no effect with --lr-decay-style constant"
    if config.cluster.device == "cpu" and config.model.bf16:
        yield "bf16 on a CPU is slow and rounds the log-probs; --fp32 is exact"


def _engine(config: Config) -> Iterator[str]:
    if config.rollout.engine == "embedded" or not config.needs_engine:
        return
    layout = sglang_rules.EngineLayout.of(config)
    if layout.tp > 1 and layout.ep == 1:
        yield (
            f"SGLang shards every expert over the engine's {layout.tp} GPUs (its ep-size is 1); "
            f"--sglang-ep-size {layout.tp} spreads whole experts instead"
        )
    if config.sglang.args and sglang_rules.find_sglang_python(config.rollout.rollout_engine_python) is None:
        yield "SGLang is not installed here, so names and values of --sglang-* are not checked"
