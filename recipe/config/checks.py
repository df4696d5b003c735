"""Rules no single field can state: each is a small function that yields a sentence for what it refuses."""

import re
from collections.abc import Callable, Iterator
from itertools import chain

from recipe.config import async_rules, layout_rules, sglang_machine, sglang_rules, speculation_rules
from recipe.config.architecture import Architecture, contradictions
from recipe.config.error_text import nearest
from recipe.config.flags import SGLANG_KEY, spell
from recipe.config.groups_rollout import RolloutConfig
from recipe.config.groups_training import GrpoConfig
from recipe.config.schema import Config
from recipe.config.speculation_rules import EAGLE

_NOT_IN_A_NAME = re.compile("[^a-zA-Z0-9_]")
Rule = Callable[[Config, Architecture], Iterator[str]]

OPSM_DELTA: float = GrpoConfig.model_fields["opsm_delta"].default
MOST_REPLAYED_EXPERTS = 255
"""Experts of a layer that a byte numbers, of which one value is none (`recipe.messages.NOT_ROUTED`)."""


def problems_of(config: Config, architecture: Architecture) -> list[str]:
    """Everything that is wrong with `config` for a model of `architecture`, a sentence each."""
    return list(chain.from_iterable(rule(config, architecture) for rule in RULES))


def architecture_flags_agree(config: Config, architecture: Architecture) -> Iterator[str]:
    """Architecture flags are the checkpoint's own values."""
    yield from contradictions(config.model, architecture)


def groups_are_large_enough(config: Config, _: Architecture) -> Iterator[str]:
    """An advantage is relative to a group of at least two; supervised steps have no groups."""
    samples = config.rollout.n_samples_per_prompt
    if config.is_sft and samples != 1:
        yield f"--loss-type sft learns one response a prompt, but --n-samples-per-prompt is {samples}; give 1"
    if not config.is_sft and samples == 1 and config.grpo.advantage_estimator != "reinforce_plus_plus":
        yield ("--n-samples-per-prompt 1 leaves GRPO without a group: a lone sample's advantage is 0; give 2 or more")


def objectives_have_their_terms(config: Config, _: Architecture) -> Iterator[str]:
    """Flags of one objective are not given to another that has no such term."""
    grpo = config.grpo
    if grpo.disable_grpo_std_normalization and grpo.advantage_estimator not in ("grpo", "gspo", "cispo"):
        yield (
            f"--disable-grpo-std-normalization: --advantage-estimator {grpo.advantage_estimator} does not divide by a "
            "group's deviation; drop it"
        )
    if grpo.eps_clip_c is not None and grpo.advantage_estimator == "cispo":
        yield "--eps-clip-c: --advantage-estimator cispo has no surrogate that it could bound; drop it"


def batches_divide(config: Config, _: Architecture) -> Iterator[str]:
    """A rollout is whole optimizer steps, a step the same number of samples on every data-parallel rank."""
    batch, rollout = config.global_batch_size, config.rollout
    samples, ranks = config.samples_per_rollout, config.data_parallel_size
    valid = [size for size in range(1, samples + 1) if samples % size == 0 and size % max(1, ranks) == 0]
    advice = f"; nearest that suit: {nearest(batch, valid)}" if valid and ranks else ""
    if config.samples_per_rollout % batch:
        prompts, group = rollout.rollout_batch_size, rollout.n_samples_per_prompt
        yield (
            f"--global-batch-size {batch} does not divide the rollout's {config.samples_per_rollout} samples "
            f"(--rollout-batch-size {prompts} x --n-samples-per-prompt {group}){advice}"
        )
    if ranks == 0 or config.world_size % config.model_parallel_size:
        return
    if batch % ranks:
        over = f"the {ranks} data-parallel ranks (ranks / TP / PP / CP)"
        yield f"--global-batch-size {batch} does not divide by {over}{advice}"
        return
    of_rank = f"the {batch // ranks} samples a data-parallel rank has in a step"
    micro = 1 if config.perf.use_dynamic_batch_size else config.perf.micro_batch_size
    if (batch // ranks) % micro:
        yield f"--micro-batch-size {micro} does not divide {of_rank}"
    elif (batch // ranks // micro) % config.perf.microbatch_multiple:
        yield (
            f"--num-layers-per-virtual-pipeline-stage needs a number of microbatches that divides by the "
            f"{config.perf.microbatch_multiple} stages, and {of_rank} do not; change --global-batch-size"
        )


def dynamic_batches_are_bounded(config: Config, _: Architecture) -> Iterator[str]:
    """Packing needs a number of tokens to pack to."""
    if config.perf.use_dynamic_batch_size and config.perf.max_tokens_per_gpu is None:
        yield "--use-dynamic-batch-size needs --max-tokens-per-gpu"


def responses_fit(config: Config, architecture: Architecture) -> Iterator[str]:
    """A prompt and a response together fit the context, and the context the model."""
    rollout, longest = config.rollout, architecture.max_position_embeddings
    context = rollout.rollout_max_context_len or longest
    if context > longest:
        yield f"--rollout-max-context-len {context} is longer than the model's {longest} (max_position_embeddings)"
    prompt = config.data.rollout_max_prompt_len or 1
    if prompt + rollout.rollout_max_response_len > context:
        asked = f"--rollout-max-response-len {rollout.rollout_max_response_len}"
        if config.data.rollout_max_prompt_len is not None:
            asked += f" and --rollout-max-prompt-len {prompt}"
        yield f"{asked} do not fit a context of {context} tokens"
    evaluation = config.eval.eval_max_response_len
    if evaluation is not None and evaluation >= longest:
        yield f"--eval-max-response-len {evaluation} leaves no room for a prompt in the model's {longest} tokens"


def reward_is_named(config: Config, _: Architecture) -> Iterator[str]:
    """Something grades what is generated."""
    rollout = config.rollout
    if rollout.group_rm and rollout.custom_rm_path is None:
        yield "--group-rm is about --custom-rm-path: give one, or drop it"
    if not (rollout.rm_type or rollout.custom_rm_path or rollout.custom_generate_function_path):
        if not config.is_sft:
            yield "no reward: give --rm-type (deepscaler, math or dapo) or --custom-rm-path module:function"
        elif config.eval.eval_prompt_data:
            yield "evaluation needs a reward: give --rm-type or --custom-rm-path, or drop --eval-prompt-data"


def sampling_is_enough(config: Config, _: Architecture) -> Iterator[str]:
    """Enough prompts are drawn, and what is masked is there."""
    rollout = config.rollout
    if rollout.draw_size < rollout.rollout_batch_size:
        yield (
            f"--over-sampling-batch-size {rollout.over_sampling_batch_size} is below --rollout-batch-size "
            f"{rollout.rollout_batch_size}: a rollout would have to be drawn in parts"
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        yield "--mask-offpolicy-in-partial-rollout needs --partial-rollout: without it no token is off-policy"


def generation_is_custom(config: Config, _: Architecture) -> Iterator[str]:
    """Limits of a function need the function, and a rollout to make."""
    rollout, fields = config.rollout, RolloutConfig.model_fields
    names = ("custom_generate_timeout_s", "custom_generate_max_turns", "custom_generate_on_failure")
    for name in (name for name in names if getattr(rollout, name) != fields[name].default):
        if rollout.custom_generate_function_path is None:
            yield f"--{name.replace('_', '-')} has no effect without --custom-generate-function-path"


def clipping_is_ordered(config: Config, _: Architecture) -> Iterator[str]:
    """The upper clip is no narrower than the lower one, and bounds stand in order."""
    grpo = config.grpo
    if grpo.clip_high < grpo.eps_clip:
        yield f"--eps-clip-high {grpo.eps_clip_high} is below --eps-clip {grpo.eps_clip}; it widens the upper side only"
    if grpo.tis_clip_low >= grpo.tis_clip:
        yield f"--tis-clip-low {grpo.tis_clip_low} is not below --tis-clip {grpo.tis_clip}"


def corrections_belong_together(config: Config, _: Architecture) -> Iterator[str]:
    """One correction at a time, and none whose flags would be ignored."""
    grpo = config.grpo
    if grpo.custom_tis_function_path is not None and grpo.use_tis:
        yield "--custom-tis-function-path takes the place of --use-tis: give one of the two"
    bounds = (grpo.tis_level, grpo.tis_mode, grpo.tis_clip, grpo.tis_clip_low)
    if not grpo.use_tis and bounds != ("token", "truncate", 2.0, 0.0):
        yield "--tis-level, --tis-mode, --tis-clip and --tis-clip-low have no effect without --use-tis"
    if not grpo.use_opsm and grpo.opsm_delta != OPSM_DELTA:
        yield "--opsm-delta has no effect without --use-opsm"
    given = {
        "--dr-grpo": grpo.dr_grpo,
        "--use-opsm": grpo.use_opsm,
        "--custom-tis-function-path": grpo.custom_tis_function_path is not None,
    }
    for flag in (flag for flag, is_given in given.items() if is_given and config.is_sft):
        yield f"{flag}: --loss-type sft has no engine's samples to weigh; drop it"
    if grpo.dr_grpo and grpo.calculate_per_token_loss:
        yield "--dr-grpo and --calculate-per-token-loss weigh tokens differently: give one of the two"
    if config.is_sft:
        return
    if grpo.dr_grpo and grpo.advantage_estimator not in ("grpo", "gspo", "cispo"):
        estimator = grpo.advantage_estimator
        yield f"--dr-grpo: --advantage-estimator {estimator} does not divide by a group's deviation; drop it"


def kl_is_asked_for_once(config: Config, _: Architecture) -> Iterator[str]:
    """A KL coefficient without --use-kl-loss would be ignored, and KL both in loss and reward counts twice."""
    grpo = config.grpo
    if grpo.kl_loss_coef > 0 and not grpo.use_kl_loss:
        yield f"--kl-loss-coef {grpo.kl_loss_coef} has no effect without --use-kl-loss"
    if grpo.kl_loss_coef > 0 and grpo.use_kl_loss and grpo.kl_coef > 0:
        yield "--kl-loss-coef and --kl-coef would count the KL twice; set one of them to 0"


def routing_can_be_replayed(config: Config, architecture: Architecture) -> Iterator[str]:
    """What is replayed was recorded, and an expert's number fits a byte."""
    grpo = config.grpo
    replays = {
        "--use-rollout-routing-replay": grpo.replays_rollouts,
        "--use-routing-replay": grpo.use_routing_replay,
    }
    if grpo.use_routing_replay and config.is_sft:
        yield "--use-routing-replay: --loss-type sft learns given responses, which nobody has routed; drop it"
    for flag in (flag for flag, is_given in replays.items() if is_given):
        if (experts := architecture.n_routed_experts) > MOST_REPLAYED_EXPERTS:
            yield f"{flag} takes up to {MOST_REPLAYED_EXPERTS} experts, and this model has {experts}; drop it"
    args, on_sglang = config.sglang.args, config.rollout.engine == "sglang"
    misleading = {
        "speculative_eagle_topk": args.get("speculative_eagle_topk", 1) != 1,
        "speculative_algorithm": args.get("speculative_algorithm", EAGLE[0]) not in EAGLE,
        "enable_hierarchical_cache": args.get("enable_hierarchical_cache", False) is True,
    }
    for name in (name for name, is_given in misleading.items() if is_given):
        if grpo.replays_rollouts and on_sglang:
            yield (
                f"--use-rollout-routing-replay with {spell(f'{SGLANG_KEY}.{name}', args[name])}: SGLang would tell the "
                "experts of other tokens; leave it out, or give --no-use-rollout-routing-replay"
            )
    stages = sglang_rules.size_of(config, "pp_size", default=1)
    if grpo.replays_rollouts and config.rollout.engine == "sglang" and stages > 1:
        yield (
            f"--use-rollout-routing-replay with --sglang-pp-size {stages}: each stage keeps the experts of "
            "its own layers, and one of them answers; leave it out, or give --no-use-rollout-routing-replay"
        )
    if config.records_routing and not config.is_sft and not config.needs_old_log_probs:
        yield (
            "--use-routing-replay replays the old-log-prob pass, and with one optimizer step a rollout there is none; "
            "give --use-rollout-routing-replay to replay the engine, or a smaller --global-batch-size"
        )


def schedule_is_ordered(config: Config, _: Architecture) -> Iterator[str]:
    """Warm-up ends before the decay does, and the decay goes down."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}"
    end = optimizer.lr_decay_iters or config.total_steps
    if optimizer.lr_warmup_iters >= end and optimizer.lr_decay_style != "constant":
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of the {end} steps to decay in"


def offload_flags_belong_together(config: Config, _: Architecture) -> Iterator[str]:
    """The details of CPU Adam need CPU Adam."""
    optimizer = config.optimizer
    if optimizer.optimizer_cpu_offload:
        return
    if optimizer.overlap_cpu_optimizer_d2h_h2d:
        yield "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload: without it nothing is copied"
    if optimizer.optimizer_offload_fraction != 1.0:
        yield "--optimizer-offload-fraction needs --optimizer-cpu-offload"


def names_differ(config: Config, _: Architecture) -> Iterator[str]:
    """Names tell the results apart."""
    sets = [prompts.name for prompts in config.eval.eval_prompt_data]
    for name in sorted({name for name in sets if sets.count(name) > 1}):
        yield f"--eval-prompt-data names two files {name}"
    files = [file.name for file in config.data.prompt_data]
    for what, names in (("evaluation sets", sets), ("prompt files", files)):
        at_prometheus = {_NOT_IN_A_NAME.sub("_", name) for name in names}
        if config.misc.metrics_port is not None and len(at_prometheus) < len(set(names)):
            yield f"--metrics-port: Prometheus takes letters, digits and _ in a name, and two {what} would have one"


def target_can_be_judged(config: Config, _: Architecture) -> Iterator[str]:
    misc, evaluation = config.misc, config.eval
    if misc.target_gain is None:
        if misc.target_gain_after is not None:
            yield "--target-gain-after has no effect without --target-gain"
    elif not evaluation.eval_prompt_data:
        yield "--target-gain is a gain on the first set of --eval-prompt-data: give one"
    elif evaluation.skip_eval_before_train:
        yield "--target-gain is judged against the evaluation before the first step: drop --skip-eval-before-train"


def mtp_layer_exists(config: Config, architecture: Architecture) -> Iterator[str]:
    """MTP layers are loaded from the checkpoint, and trained only where they are loaded."""
    asked, held = config.mtp.mtp_num_layers or 0, architecture.num_nextn_predict_layers
    if config.mtp.enable_mtp_training and asked == 0:
        yield "--enable-mtp-training needs --mtp-num-layers 1 (or more): no MTP layer is loaded"
    if asked > held:
        config_json = config.model.hf_checkpoint / "config.json"
        yield f"--mtp-num-layers {asked} contradicts {config_json}, where num_nextn_predict_layers is {held}"


def numerics_are_fixed(config: Config, _: Architecture) -> Iterator[str]:
    """Log-probs must be reproducible, and sums exact enough to compare them with the engine's."""
    misc = config.misc
    for flag, dropout in (
        ("--attention-dropout", misc.attention_dropout),
        ("--hidden-dropout", misc.hidden_dropout),
    ):
        if dropout:
            yield f"{flag} {dropout} must be 0: with dropout a policy's log-probs are random, and ratios mean nothing"
    if not misc.accumulate_allreduce_grads_in_fp32:
        yield "--no-accumulate-allreduce-grads-in-fp32 is refused: sums of bf16 gradients lose small samples"
    if not misc.attention_softmax_in_fp32:
        yield "--no-attention-softmax-in-fp32 is refused: the engine's attention is in fp32, and log-probs must agree"


def device_has_the_kernels(config: Config, _: Architecture) -> Iterator[str]:
    """Flash and fused attention are CUDA kernels."""
    backend = config.perf.attention_backend
    if config.cluster.device == "cpu" and backend in ("flash", "fused"):
        yield f"--attention-backend {backend} needs a GPU, but --device is cpu; use auto or unfused"
    elif not config.model.bf16 and backend in ("flash", "fused"):
        yield f"--attention-backend {backend} needs --bf16: the kernel has no fp32; use auto or unfused"


RULES: tuple[Rule, ...] = (
    architecture_flags_agree,
    *layout_rules.RULES,
    groups_are_large_enough,
    objectives_have_their_terms,
    batches_divide,
    dynamic_batches_are_bounded,
    responses_fit,
    reward_is_named,
    sampling_is_enough,
    generation_is_custom,
    clipping_is_ordered,
    corrections_belong_together,
    kl_is_asked_for_once,
    routing_can_be_replayed,
    schedule_is_ordered,
    offload_flags_belong_together,
    names_differ,
    target_can_be_judged,
    mtp_layer_exists,
    numerics_are_fixed,
    device_has_the_kernels,
    *async_rules.RULES,
    *sglang_rules.RULES,
    *speculation_rules.RULES,
    sglang_machine.machine_suits_sglang,
)
