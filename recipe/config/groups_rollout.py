"""The groups around the trainer: cluster, data, rollout, eval, sglang, misc. Names are slime's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from recipe.config.fields import (
    Cores,
    EvalPromptDataPairs,
    Group,
    JsonObject,
    Key,
    Place,
    PositiveShare,
    PromptDataFiles,
    SglangValue,
    Spelling,
    Temperature,
    TopK,
)

InFlight = Literal["keep", "recompute"]
"""What becomes of the cache of requests that are under way when weights are replaced."""


class ClusterConfig(Group):
    """The machines."""

    actor_num_nodes: PositiveInt = 1
    """Machines that train."""
    actor_num_gpus_per_node: PositiveInt = 8
    """Training ranks of a machine: its GPUs, or processes on a CPU."""
    rollout_num_gpus: PositiveInt | None = None
    """GPUs of the engines; default: the training GPUs with `colocate`, one embedded engine without a GPU."""
    colocate: bool = False
    """Engines and trainer share the GPUs and take turns."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the trainer computes; auto: cuda where there is one."""
    master_addr: str | None = None
    """Address every machine reaches the first one by; default: found by Ray."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """Longest wait in a collective operation; somewhat earlier a rank that hangs is looked for, and named. Also the
    longest that saving may take when the run fails."""
    num_cpus_per_rank: Cores | None = None
    """CPU cores reserved for a training rank; default: shared evenly."""
    num_cpus_per_engine: Cores | None = None
    """CPU cores reserved for an engine; default: shared evenly."""


class DataConfig(Group):
    """The prompt files."""

    prompt_data: PromptDataFiles
    """Training prompts, as PATH or PATH:WEIGHT, files of jsonl or parquet. Of several, weights are their shares of the
    draws, which add up to 1; without, each counts by its number of prompts."""
    input_key: Key = "prompt"
    """Key of the prompt: chat messages or a string."""
    label_key: Key = "label"
    """Key of the right answer; dots lead into tables, as in reward_model.ground_truth."""
    metadata_key: Key = "metadata"
    """Key of a table in a line, whose `rm_type` is the built-in reward of that line's responses in place of the
    run's."""
    response_key: Key = "response"
    """Key of the response to learn (sft only)."""
    apply_chat_template: bool = False
    """Wrap prompts in the tokenizer's chat template."""
    apply_chat_template_kwargs: JsonObject = Field(default_factory=dict)
    """What the chat template is given besides, such as {"enable_thinking": false}; for evaluations too."""
    tool_key: Key = "tools"
    """Key of the tools that the chat template shows the model, a list in a line that has one."""
    rollout_shuffle: bool = False
    """Shuffle the prompts in every epoch."""
    rollout_max_prompt_len: PositiveInt | None = None
    """Longest prompt in tokens, longer ones are left out; default: what the context leaves beside a response."""


class RolloutConfig(Group):
    """Generation and grading."""

    engine: Annotated[Literal["sglang", "embedded"], Spelling(name="--rollout-engine")] = "sglang"
    """sglang: SGLang servers; embedded: a small server of the same API in plain torch, for CPUs."""
    rollout_engine_python: Place | None = None
    """Python of the environment that SGLang is installed in; default: the trainer's own if it has SGLang, else that of
    .venv-sglang."""
    num_rollout: PositiveInt
    """Rollouts of the run."""
    rollout_batch_size: PositiveInt
    """Prompts of a rollout."""
    n_samples_per_prompt: PositiveInt = 1
    """Samples of a prompt: the group of GRPO."""
    over_sampling_batch_size: PositiveInt | None = None
    """Prompts drawn at a time; with more than `rollout_batch_size` the first groups to finish are kept and the rest is
    aborted, so that nobody waits for the longest responses; default: `rollout_batch_size`."""
    dynamic_sampling_filter_path: Annotated[str, Field(pattern=r"^(check_reward_nonzero_std|[\w.]+:\w+)$")] | None = (
        None
    )
    """Which groups are kept: check_reward_nonzero_std (whose rewards differ), or a function of your own, as
    module:function, from a SampleGroup to a bool. A group that is not is replaced by another prompt's."""
    dynamic_sampling_max_refills: NonNegativeInt = 10
    """Times that prompts are drawn again for a rollout before the run stops for want of groups to keep."""
    partial_rollout: bool = False
    """Aborted samples wait with their tokens for the next rollout, which goes on with them."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Of such samples, train only on the tokens that the current weights made."""
    global_batch_size: PositiveInt | None = None
    """Samples of an optimizer step; default: all samples of a rollout."""
    rollout_max_response_len: PositiveInt
    """Longest response in tokens."""
    rollout_max_context_len: PositiveInt | None = None
    """Longest prompt and response together; default: the model's."""
    rollout_temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same."""
    rollout_top_p: PositiveShare = 1.0
    """Nucleus sampling."""
    rollout_top_k: TopK = -1
    """Sample from the k most likely tokens; -1: from all."""
    rollout_stop: tuple[str, ...] = ()
    """Strings that end a response."""
    rollout_stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end a response besides the model's own."""
    rm_type: Literal["deepscaler", "math", "dapo"] | None = None
    """Built-in reward, where a prompt's line names none (`metadata_key`)."""
    custom_rm_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """Reward function of your own, as module:function, fn(prompt, response, label) -> float, which may be a coroutine;
    it takes the place of `rm_type`. A reward that `custom_generate_function_path` gives takes the place of both."""
    group_rm: bool = False
    """`custom_rm_path` sees all responses to a prompt at once: fn(prompt, responses, label) -> a number for each."""
    rm_timeout_s: Annotated[float, Field(gt=0.0, le=86400.0)] | None = None
    """Longest time to grade one response, in seconds; default: 5, and 60 for a function of your own."""
    rm_num_workers: PositiveInt | None = None
    """Grading processes; default: 2, and for a function of your own as many as there are cores, up to 32."""
    custom_generate_function_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """How a sample is generated, in several turns with tools or an environment between them: an async function of your
    own, as module:function, fn(sample, engine, settings); for evaluations too; default: one turn."""
    custom_generate_timeout_s: Annotated[float, Field(gt=0.0, le=86400.0)] = 600.0
    """Longest time that it may take for a sample, in seconds, besides waiting for engines."""
    custom_generate_max_turns: PositiveInt | None = None
    """Turns of the model in a sample at most; default: as many as `rollout_max_response_len` has room for, in which
    what the model reads between them counts too."""
    custom_generate_on_failure: Literal["leave_out", "stop"] = "leave_out"
    """What becomes of a sample at which it fails: leave_out (nothing is learned from it, its group is compared without
    it, and `custom_generate_failed` counts it), or stop (the run ends)."""
    async_rollout: bool = False
    """Generate while the trainer works, on engines with GPUs of their own."""
    max_staleness: NonNegativeInt | None = None
    """With `async_rollout`: weight versions that the oldest token of a sample may lie behind those that it is trained
    from; 0 generates nothing ahead; default: 1."""
    async_order: Literal["fixed", "finished"] | None = None
    """With `async_rollout`: fixed (default) makes one rollout after the other, each under the weights of one version,
    and repeats exactly; finished trains on the groups that finish first, and repeats nothing."""
    rollout_max_concurrency: PositiveInt = 256
    """Requests in flight at most."""
    rollout_request_timeout_s: PositiveFloat | None = None
    """Longest wait for one response, its queueing in the engine included, in seconds; default: as long as the engine
    passes its health checks."""
    rollout_max_retries: NonNegativeInt = 3
    """Times a failed request is sent again."""
    rollout_engine_start_timeout_s: PositiveFloat = 600.0
    """Longest wait for an engine to become healthy, in seconds."""
    rollout_health_check_interval: PositiveFloat = 30.0
    """Seconds between two checks that an engine generates, while it does; one that does not is replaced."""
    rollout_health_check_timeout: PositiveFloat = 30.0
    """Longest wait for the answer to such a check, in seconds, and for that of an engine that is to stand still for
    weights in flight."""
    rollout_health_check_first_wait: NonNegativeFloat = 0.0
    """Time after an engine's start in which it is not checked, in seconds; for engines that compile first."""
    update_weight_transfer: Literal["tensor", "distributed", "disk"] | None = None
    """How weights reach the engines: tensor (shared memory, or CUDA IPC where they are colocated), distributed (a
    broadcast group), disk; default: distributed to engines with GPUs of their own, else tensor."""
    update_weight_buffer_size: PositiveInt = 512 << 20
    """Bytes of weights that are on their way to the engines at once."""
    update_weight_timeout: PositiveFloat = 120.0
    """Seconds an engine has to take a bucket of weights; one that does not is ended, started again, and gets them."""
    update_weight_in_flight: InFlight | None = None
    """New weights reach engines while responses are under way: engines stand still between two tokens, take the weights
    and go on, with their cache kept (what it has of older tokens stays that of older weights) or recomputed under the
    new ones; every token carries its version; default: weights are sent when nothing is under way."""
    check_weight_update_equal: bool = False
    """After each update, compare the checksum of every tensor in the engines with the trainer's."""

    @property
    def draw_size(self) -> int:
        """Prompts drawn at a time."""
        return self.over_sampling_batch_size or self.rollout_batch_size

    @property
    def keeps_in_order(self) -> bool:
        """Whether the groups of a rollout are the first ones drawn (that pass the filter), and do not depend on which
        finish first."""
        return self.draw_size == self.rollout_batch_size and not self.partial_rollout

    @property
    def staleness(self) -> int:
        """Weight versions that a token may lie behind those that it is trained from; above 0, rollouts are made while
        the trainer works."""
        if not self.async_rollout:
            return 0
        return 1 if self.max_staleness is None else self.max_staleness

    @property
    def is_in_fixed_order(self) -> bool:
        """Whether rollouts that are made ahead are made one after the other."""
        return self.async_order != "finished"


class EvalConfig(Group):
    """Evaluation on held-out prompts."""

    eval_function_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = "evaluation.in_loop:InLoopEvaluation"
    """module:function that reads the evaluation sets and scores answers to them: `Evaluation` in
    `recipe.assembly.inputs`."""
    eval_interval: PositiveInt | None = None
    """Evaluate after every this many rollouts; default: before the first and after the last."""
    eval_prompt_data: EvalPromptDataPairs = ()
    """Held-out prompt files, as NAME PATH pairs."""
    eval_input_key: Key | None = None
    """Key of the prompt in them; default: `input_key`."""
    eval_label_key: Key | None = None
    """Key of the right answer in them; default: `label_key`."""
    eval_instruction: str | None = None
    """Added to questions that do not ask for a box, none if empty; default: that of `evaluation.aime`, but none with
    the rewards that look for another form of answer (`rm_type` dapo and custom ones)."""
    eval_labels: Literal["aime", "any"] = "aime"
    """Right answers that are taken: integers from 0 to 999, or any that the reward can grade."""
    n_samples_per_eval_prompt: PositiveInt = 1
    """Samples of an evaluation prompt."""
    eval_max_response_len: PositiveInt | None = None
    """Longest response in tokens; default: the rollout's."""
    eval_temperature: Temperature | None = None
    """Sampling temperature, 0 for the most likely token; default: the rollout's."""
    eval_top_p: PositiveShare | None = None
    """Nucleus sampling; default: the rollout's."""
    eval_top_k: TopK | None = None
    """Sample from the k most likely tokens; default: the rollout's."""
    skip_eval_before_train: bool = False
    """Do not evaluate before the first rollout."""


class SglangConfig(Group):
    """The SGLang servers. Any argument of theirs is a flag with the prefix --sglang-, or a key of [sglang.args]."""

    rollout_num_gpus_per_engine: PositiveInt = 1
    """GPUs of one server: on one machine, or all of several."""
    speculative_max_batch: PositiveInt | None = None
    """Sequences at once up to which an engine speculates; beyond, where drafts cost more than they bring, it does not.
    Default: it always does. Measure it with scripts/bench_rollout.py."""
    args: Mapping[str, SglangValue] = {}
    """SGLang's own arguments, by name without the prefix: mem_fraction_static = 0.7. False leaves one out that a recipe
    gives, as `--sglang-X false` does on the command line."""

    def command_line(self) -> list[str]:
        """`args` as SGLang's command line spells them; true is a bare flag."""
        words: list[str] = []
        for name, value in self.args.items():
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words += [str(item) for item in (value if isinstance(value, tuple) else (value,))]
        return words


class MiscConfig(Group):
    """The run, and numerics that are fixed."""

    seed: NonNegativeInt = 1234
    """Seed of every random draw."""
    name: str = Field(default="run", pattern=r"^\w[\w.-]*$")
    """Name of the run directory."""
    runs_dir: Place = Path("runs")
    """Folder of the run directories."""
    attention_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of attention weights; must be 0."""
    hidden_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of the residual stream; must be 0."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in float32."""
    attention_softmax_in_fp32: bool = True
    """Softmax of the attention in float32."""
    use_wandb: bool = False
    """Send metrics to Weights & Biases too."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Serve the newest metrics to Prometheus at this port of 127.0.0.1."""
    sigterm_grace_s: PositiveFloat = 100.0
    """Time to finish the step and save after a SIGTERM, in seconds; most spot nodes are taken away after 30 to 120."""
    price: NonNegativeFloat = 2.5
    """Dollars of a GPU an hour; of a machine, where the run uses no GPU."""
    max_dollars: PositiveFloat | None = None
    """Save and end, with status 76, before a step that would bring the run's cost over this, by `--price`."""
    max_hours: PositiveFloat | None = None
    """Save and end, with status 76, before a step that would bring the run's time over this, earlier commands too."""
    target_gain: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Save and end, with status 76, when the 95% interval of the first evaluation set's gain since before the first
    step says: this much is reached, or, from `--target-gain-after` on, it is not."""
    target_gain_after: PositiveInt | None = None
    """Rollouts from which on a gain that is certainly below `--target-gain` ends the run; default: never."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged."""
    keep_token_groups: NonNegativeInt = 1
    """Of each rollout, the groups whose tokens are kept one by one for `make watch`."""
    keep_steps_for_mismatch: NonNegativeInt = 1
    """Of the steps that begin at a checkpoint, the newest whose tokens are kept for `make mismatch`."""
    mismatch_warn: PositiveFloat = 0.05
    """Mean difference of the trainer's and the engine's log-probs above which a step warns."""
