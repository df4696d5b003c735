"""The groups of the trainer: model, checkpoint, grpo, optimizer, perf, mtp. Names are megatron's and slime's."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from recipe.config.fields import Group, LayerPattern, Place, PositiveShare, Share, Spelling

ROLLOUT_ID = "{rollout_id}"
"""In `save_hf`: stands for the number of finished rollouts."""


class ModelConfig(Group):
    """The checkpoint that is trained. Its config.json is the architecture; the fields after `bf16` are only compared
    with it, so that a script written for another model fails before anything starts."""

    hf_checkpoint: Place
    """Folder of the Hugging Face checkpoint (safetensors, config.json, tokenizer)."""
    bf16: Annotated[bool, Spelling(off=("--fp32",))] = True
    """Compute in bfloat16 (masters and optimizer stay fp32); `--fp32` computes in float32."""

    num_layers: PositiveInt | None = None
    """Transformer layers without the MTP layer (num_hidden_layers)."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of a dense layer's MLP (intermediate_size)."""
    num_attention_heads: PositiveInt | None = None
    """Attention heads."""
    kv_channels: PositiveInt | None = None
    """Width of a head's keys without the rotary part (qk_nope_head_dim)."""
    q_lora_rank: PositiveInt | None = None
    """Rank of the query projection."""
    kv_lora_rank: PositiveInt | None = None
    """Rank of the key and value projection."""
    qk_head_dim: PositiveInt | None = None
    """Width of a head's queries and keys without the rotary part (qk_nope_head_dim)."""
    qk_pos_emb_head_dim: PositiveInt | None = None
    """Width of the rotary part (qk_rope_head_dim)."""
    v_head_dim: PositiveInt | None = None
    """Width of a head's values."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding."""
    make_vocab_size_divisible_by: PositiveInt | None = None
    """Must divide the vocabulary, which is never padded here."""
    max_position_embeddings: PositiveInt | None = None
    """The longest context in tokens."""
    rotary_base: PositiveFloat | None = None
    """Base of the rotary embedding (rope_theta)."""
    rotary_percent: PositiveShare | None = None
    """Share of the rotary part that is rotated."""
    rotary_scaling_factor: PositiveFloat | None = None
    """Scaling of the rotary positions; 1 is none."""
    mscale: PositiveFloat | None = None
    """Attention temperature of scaled rotary positions; 1 is none."""
    mscale_all_dim: NonNegativeFloat | None = None
    """Attention temperature over all dimensions; 1 is none."""
    rope_type: Literal["rope", "yarn"] | None = None
    """Kind of rotary embedding."""
    norm_epsilon: PositiveFloat | None = None
    """Epsilon of RMSNorm (rms_norm_eps)."""
    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """Kind of layer norm."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] | None = None
    """Kind of position embedding."""
    add_position_embedding: Annotated[bool | None, Spelling(off=("--no-position-embedding",))] = None
    """Learned position embeddings beside the rotary ones."""
    swiglu: bool | None = None
    """Gated SiLU activation."""
    add_bias_linear: Annotated[bool | None, Spelling(off=("--disable-bias-linear",))] = None
    """Biases in linear layers."""
    add_qkv_bias: bool | None = None
    """Biases in the attention projections (attention_bias)."""
    untie_embeddings_and_output_weights: bool | None = None
    """The output head has weights of its own (not tie_word_embeddings)."""
    qk_layernorm: bool | None = None
    """RMSNorm of the compressed queries and keys."""
    multi_latent_attention: bool | None = None
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    apply_rope_fusion: Annotated[bool | None, Spelling(also=("--rope-fusion",), off=("--no-rope-fusion",))] = None
    """Megatron's fused rotary kernel, which needs Transformer Engine and is not used here."""

    num_experts: PositiveInt | None = None
    """Routed experts of a layer (n_routed_experts)."""
    moe_layer_freq: LayerPattern | None = None
    """Which layers hold experts, e.g. "[0]*1+[1]*46" ([0] * first_k_dense_replace, then 1)."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width of one expert (moe_intermediate_size)."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Width of the shared experts together (n_shared_experts x moe_intermediate_size)."""
    moe_router_topk: PositiveInt | None = None
    """Experts a token is sent to (num_experts_per_tok)."""
    moe_router_num_groups: PositiveInt | None = None
    """Groups the router chooses among first (n_group)."""
    moe_router_group_topk: PositiveInt | None = None
    """Groups a token may be sent to (topk_group)."""
    moe_router_topk_scaling_factor: PositiveFloat | None = None
    """Factor on the normalised weights of the chosen experts (routed_scaling_factor)."""
    moe_router_score_function: Literal["sigmoid", "softmax"] | None = None
    """How router logits become scores."""
    moe_router_pre_softmax: bool | None = None
    """Scores are taken before the choice of experts."""
    moe_router_enable_expert_bias: bool | None = None
    """A bias that enters the choice of experts only (e_score_correction_bias)."""
    moe_router_bias_update_rate: NonNegativeFloat | None = None
    """Update rate of that bias; 0 here: the engine must route as the trainer does."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Precision of the router."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] | None = None
    """Kind of load-balancing loss; without effect, as its coefficient is 0."""
    moe_aux_loss_coeff: NonNegativeFloat | None = None
    """Coefficient of the load-balancing loss; 0 here."""


class CheckpointConfig(Group):
    """Where training starts, and what is kept of it."""

    load: Place | None = None
    """Folder of training checkpoints to go on from, or of weights (torch_dist, Hugging Face) to start from; without
    either it starts from `ref_load` or `hf_checkpoint`."""
    ref_load: Place | None = None
    """Starting weights (torch_dist, Hugging Face), also the KL reference; default: those of `hf_checkpoint`."""
    save: Place | None = None
    """Folder for training checkpoints; default: checkpoints/ in the run directory."""
    save_interval: PositiveInt | None = None
    """Save after every this many rollouts; default: after the last one only."""
    save_keep: PositiveInt | None = None
    """Newest checkpoints to keep; default: all. For one that is saved because the run fails none goes."""
    save_hf: Place | None = None
    """Folder for the final weights in Hugging Face form; with {rollout_id} in its name, which becomes the checkpoint's
    number, for those of every save."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in host memory: 14 bytes a parameter that a rank writes
    (bf16 weights, masters and both moments) until they are on the disk."""
    no_load_optim: bool = False
    """Load the weights only and start the optimizer afresh."""

    def hugging_face_target(self, rollouts: int, is_over: bool) -> Path | None:
        """Where `save_hf` wants the weights of the save after so many rollouts, if anywhere."""
        if self.save_hf is None or not (is_over or ROLLOUT_ID in str(self.save_hf)):
            return None
        return Path(str(self.save_hf).replace(ROLLOUT_ID, str(rollouts)))


Estimator = Literal["grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]


class GrpoConfig(Group):
    """The loss. GRPO: DeepSeekMath, arXiv 2402.03300."""

    loss_type: Literal["policy_loss", "sft"] = "policy_loss"
    """policy_loss: GRPO on rollouts; sft: cross-entropy on the responses of the prompt file."""
    advantage_estimator: Estimator = "grpo"
    """grpo: reward minus the group's mean, over the group's sample standard deviation; gspo: the same, with ratios of
    whole sequences, clipped at 3e-4 or so (arXiv 2507.18071); cispo: the same, with clipped ratios as constant weights
    (arXiv 2506.13585); rloo: reward minus the mean of the others' in the group (arXiv 2402.14740); reinforce_plus_plus:
    reward, with the KL of all tokens to come, normalised over the rollout (arXiv 2501.03262);
    reinforce_plus_plus_baseline: reward minus the group's mean, normalised over the rollout."""
    disable_grpo_std_normalization: Annotated[bool, Spelling(also=("--no-grpo-std",))] = False
    """Leave out the division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""
    use_kl_loss: bool = False
    """Add KL to the reference model to the loss, `kl_loss_coef` times."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of that KL; at 0 the reference model is not run."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "low_var_kl"
    """KL estimator (Schulman, "Approximating KL divergence"); low_var_kl is k3, clamped."""
    kl_coef: NonNegativeFloat = 0.0
    """Coefficient of the KL to the reference model subtracted from the reward."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus."""
    eps_clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio is clipped below at 1 - eps_clip."""
    eps_clip_high: PositiveFloat | None = None
    """The ratio is clipped above at 1 + eps_clip_high (DAPO, arXiv 2503.14476); default: eps_clip."""
    eps_clip_c: Annotated[float, Field(gt=1.0)] | None = None
    """Dual clip: bound on the ratio where the advantage is negative (arXiv 1912.09729); default: none."""
    calculate_per_token_loss: bool = False
    """Every token of the batch weighs the same; otherwise every sequence does."""
    dr_grpo: bool = False
    """Dr. GRPO (arXiv 2503.20783): no division by the standard deviation, and each token weighs the same in every
    batch, 1 / (sequences x `rollout_max_response_len`)."""
    use_tis: bool = False
    """Truncated importance sampling of the trainer's log-probs against the engine's; default: where `max_staleness` is
    above 0."""
    tis_level: Literal["token", "sequence", "geometric"] = "token"
    """Whose importance weight a token has: its own, the product of all in its sequence, or their geometric mean."""
    tis_mode: Literal["truncate", "mask"] = "truncate"
    """What becomes of a weight beyond its bounds: the bound, or 0, which leaves the token, or the sequence, out."""
    tis_clip: PositiveFloat = 2.0
    """Upper bound of that importance weight."""
    tis_clip_low: NonNegativeFloat = 0.0
    """Lower bound of that importance weight."""
    custom_tis_function_path: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """Importance weights of your own, as module:function, in the place of `use_tis`; see docs/objectives.md."""
    use_opsm: bool = False
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): leaves sequences of negative advantage out that
    the policy now gives much less than the engine did."""
    opsm_delta: NonNegativeFloat = 1e-4
    """How much less, in nats a token of a sequence, on average."""
    use_rollout_routing_replay: bool = False
    """The trainer takes every token to the experts that the engine took it to (R3, arXiv 2510.11370). No effect with
    `loss_type` sft, whose responses no engine made."""
    use_routing_replay: bool = False
    """The optimizer steps of a rollout take every token to the experts that the old-log-prob pass before them took it
    to (R2, arXiv 2507.18071)."""

    @property
    def replays_rollouts(self) -> bool:
        """Whether the trainer is told where the engine took tokens. SFT learns given responses, which none has."""
        return self.use_rollout_routing_replay and self.loss_type != "sft"

    @property
    def replays_routing(self) -> bool:
        """Whether the optimizer steps are told where to take tokens."""
        return self.replays_rollouts or self.use_routing_replay

    @property
    def clip_high(self) -> float:
        """Upper clip width: eps_clip_high, or eps_clip where it is not given."""
        return self.eps_clip if self.eps_clip_high is None else self.eps_clip_high


class OptimizerConfig(Group):
    """Adam and its schedule."""

    optimizer: Literal["adam"] = "adam"
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""
    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Optimizer steps until `min_lr`, warm-up included; default: the whole run."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of weight matrices."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state and masters in host memory and step there (CPU Adam)."""
    optimizer_offload_fraction: Share = 1.0
    """Share of the parameters whose optimizer is offloaded."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the CPU step with copies to and from the device."""
    use_precision_aware_optimizer: bool = False
    """The optimizer owns the fp32 masters, and reads the gradients as they are."""
    max_consecutive_skips: PositiveInt = 3
    """Steps skipped for non-finite gradients in a row that stop the run."""


class PerfConfig(Group):
    """How the trainer is laid out over ranks, and what it trades for memory."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer (TP)."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions by tokens; needed with TP for experts."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages the layers are split into (PP)."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share every sequence (CP)."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks the experts are spread over (EP)."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share every expert (ETP)."""
    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first stage where the split is uneven."""
    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last stage where the split is uneven."""
    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers of one virtual stage (interleaved pipeline)."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or attention only."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: recompute in uniform groups of layers, or the first layers only."""
    recompute_num_layers: PositiveInt | None = None
    """Layers of one group (uniform) or recomputed in a stage (block)."""
    use_dynamic_batch_size: bool = False
    """Pack samples into microbatches of at most `max_tokens_per_gpu` tokens."""
    max_tokens_per_gpu: PositiveInt | None = None
    """Tokens of one rank's microbatch; a longer sample has one to itself."""
    micro_batch_size: PositiveInt = 1
    """Samples of a microbatch without dynamic batch size."""
    balance_data: bool = False
    """Balance the tokens over data-parallel ranks."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts."""
    moe_grouped_gemm: bool = True
    """Compute a rank's experts in one grouped matrix product."""
    moe_permute_fusion: bool = False
    """Bring tokens to their experts and back by gathers: deterministic and faster on GPUs."""
    log_probs_chunk_size: PositiveInt = 8192
    """Tokens whose full-vocabulary logits are held at a time."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Attention kernel: torch's variable-length flash kernel, cuDNN's on padded grids (fused), or plain matrix products
    with a softmax in fp32 (unfused). auto: fused for long segments of similar length, else flash."""

    @property
    def microbatch_multiple(self) -> int:
        """What the microbatches of a step divide by: the stages, where they are interleaved."""
        return self.pipeline_model_parallel_size if self.num_layers_per_virtual_pipeline_stage else 1


class MtpConfig(Group):
    """The multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437)."""

    mtp_num_layers: NonNegativeInt | None = None
    """MTP layers to load from the checkpoint; default: none."""
    enable_mtp_training: bool = False
    """Train the MTP layer beside the policy, by the mean cross-entropy of the response tokens that it predicts; the
    loss reaches its own parameters only."""
    mtp_loss_scaling_factor: NonNegativeFloat = 0.2
    """Weight of the MTP loss."""
