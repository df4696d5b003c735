"""GLM-4.7-Flash in megatron-core: configuration, layer spec, and the model that turns packs into log-probabilities."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import MLATransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from recipe.config import Architecture, Config
from recipe.megatron import extensions, gradients, permutation
from recipe.megatron.attention import LatentAttention, PackedAttention, PackedSequences
from recipe.megatron.device import training_device
from recipe.megatron.dispatch import PackedMoELayer
from recipe.megatron.log_probs import VocabularyShard, chunked_log_probs
from recipe.megatron.modules import GroupedExperts, LatentRMSNorm, MTPLayer, RMSNorm
from recipe.megatron.routing import RoutedLayer, RoutingReplay


def virtual_pipeline_size(config: Config, architecture: Architecture) -> int | None:
    """Pipeline chunks of a rank; None where stages are not interleaved."""
    per_stage = config.perf.num_layers_per_virtual_pipeline_stage
    if per_stage is None:
        return None
    return architecture.num_hidden_layers // (config.perf.pipeline_model_parallel_size * per_stage)


def _as_allocated(weight: Tensor) -> None:
    """Initialises nothing: weights come from checkpoints. (perform_initialization=False would also leave out the
    tensor-parallel marks, without which gradient norms count one rank's shard.)"""


def transformer_config(config: Config, architecture: Architecture) -> MLATransformerConfig:
    """megatron's configuration of this architecture under this run's layout, precision and recomputation."""
    extensions.install()
    perf, dtype = config.perf, torch.bfloat16 if config.model.bf16 else torch.float32
    transformer = MLATransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=config.misc.hidden_dropout,
        bias_activation_fusion=True,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=True,
        init_method=_as_allocated,
        output_layer_init_method=_as_allocated,
        embedding_init_method=_as_allocated,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.model.bf16,
        mtp_num_layers=config.mtp.mtp_num_layers or None,
        calculate_per_token_loss=True,
        recompute_granularity=perf.recompute_granularity,
        recompute_method=perf.recompute_method,
        recompute_num_layers=perf.recompute_num_layers,
        **_attention(config, architecture),
        **_experts(config, architecture),
        **_layout(config, architecture),
    )
    if perf.moe_permute_fusion:
        permutation.install()
        transformer.moe_permute_fusion = True  # the constructor insists on Transformer Engine
    return transformer


def _attention(config: Config, architecture: Architecture) -> dict[str, Any]:
    return {
        "num_attention_heads": architecture.num_attention_heads,
        "kv_channels": architecture.v_head_dim,
        "multi_latent_attention": True,
        "q_lora_rank": architecture.q_lora_rank,
        "kv_lora_rank": architecture.kv_lora_rank,
        "qk_head_dim": architecture.qk_nope_head_dim,
        "qk_pos_emb_head_dim": architecture.qk_rope_head_dim,
        "v_head_dim": architecture.v_head_dim,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_base": architecture.rope_theta,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rotary_percent": 1.0,
        "apply_rope_fusion": False,
        "attention_dropout": config.misc.attention_dropout,
        "masked_softmax_fusion": False,
        "attention_backend": AttnBackend[config.perf.attention_backend],
        "attention_softmax_in_fp32": config.misc.attention_softmax_in_fp32,
    }


def _experts(config: Config, architecture: Architecture) -> dict[str, Any]:
    dense = architecture.first_k_dense_replace
    return {
        "num_moe_experts": architecture.n_routed_experts,
        "moe_ffn_hidden_size": architecture.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": architecture.moe_intermediate_size * architecture.n_shared_experts,
        "moe_layer_freq": [0] * dense + [1] * (architecture.num_hidden_layers - dense),
        "moe_router_topk": architecture.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": architecture.routed_scaling_factor,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": config.perf.moe_token_dispatcher_type,
        "moe_grouped_gemm": False,
    }


def _layout(config: Config, architecture: Architecture) -> dict[str, Any]:
    perf, virtual_stages = config.perf, virtual_pipeline_size(config, architecture)
    return {
        "tensor_model_parallel_size": perf.tensor_model_parallel_size,
        "sequence_parallel": perf.sequence_parallel,
        "pipeline_model_parallel_size": perf.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        # Interleaved stages with megatron's batched point-to-point default give wrong gradients, silently.
        "overlap_p2p_comm": virtual_stages is not None,
        "batch_p2p_comm": virtual_stages is None,
        "num_layers_in_first_pipeline_stage": perf.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": perf.decoder_last_pipeline_num_layers,
        "variable_seq_lengths": perf.pipeline_model_parallel_size > 1,
        "context_parallel_size": perf.context_parallel_size,
        "expert_model_parallel_size": perf.expert_model_parallel_size,
        "expert_tensor_parallel_size": perf.expert_tensor_parallel_size,
    }


def _use_our_modules(layer: ModuleSpec) -> ModuleSpec:
    """One transformer layer's spec with our attention, norms and experts.

    The two down projections are replicated: megatron's column-parallel ones give wrong gradients to the rotary rows
    under tensor parallelism.
    """
    layer = copy.deepcopy(layer)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.module = LatentAttention
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.linear_q_down_proj = attention.linear_kv_down_proj = ReplicatedLinear
    attention.q_layernorm = attention.kv_layernorm = LatentRMSNorm
    if parts.mlp.module is MoELayer:
        parts.mlp.module = PackedMoELayer
        parts.mlp.submodules.experts = ModuleSpec(module=GroupedExperts)
    return layer


def layer_specs(
    config: MLATransformerConfig, vp_stage: int | None = None
) -> tuple[TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules | None]:
    """The decoder layers of this pipeline stage, and the MTP block if the stage holds it."""
    decoder = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    decoder.layer_specs = [_use_our_modules(layer) for layer in decoder.layer_specs]
    for layer in decoder.layer_specs:
        if layer.submodules.mlp.module is PackedMoELayer:
            layer.module = RoutedLayer
    decoder.layer_norm = RMSNorm
    if config.mtp_num_layers is None:
        return decoder, None
    last = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")[-1]
    mtp = get_gpt_mtp_block_spec(config, _use_our_modules(last), use_transformer_engine=False, vp_stage=vp_stage)
    if mtp is not None:
        for layer in mtp.layer_specs:
            layer.module = MTPLayer
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return decoder, mtp


@dataclass(frozen=True)
class NextTokens:
    """Which log-probabilities a forward pass is asked for.

    Letters: N asked tokens. `index` [N] rows of the pack whose successor is asked for; `targets` [N] those successors.
    """

    index: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MtpInput:
    """The samples of a pack as whole sequences of U tokens on this rank, for the MTP layer."""

    rows: Tensor | None
    """[U] the pack's row that holds each token's hidden state; None where the pack's rows are these tokens."""
    next_ids: Tensor
    """[1, U] each token's successor in its own sequence (any token at a sequence's end)."""
    position_ids: Tensor
    """[1, U]"""
    sequences: PackedSequences
    ask: NextTokens
    """Those of the U tokens whose second successor is asked for, and those second successors."""


@dataclass(frozen=True)
class ModelInput:
    """One pack on this rank: ids and positions [1, T], its segments, and what is asked of it."""

    input_ids: Tensor
    position_ids: Tensor
    sequences: PackedSequences
    ask: NextTokens
    mtp: MtpInput | None
    """None where the MTP layer is not trained."""


@dataclass(frozen=True)
class ModelOutput:
    """What the last pipeline stage returns for a pack: fp32 [N] log-probabilities and entropies."""

    log_probs: Tensor
    entropy: Tensor
    mtp_log_probs: Tensor | None
    """[N_mtp]; None unless the MTP layer is trained."""


class PolicyModel(GPTModel):
    """The policy. Its forward pass ends in the log-probabilities that are asked for, never in logits."""

    def __init__(
        self, config: MLATransformerConfig, run: Config, architecture: Architecture, vp_stage: int | None = None
    ) -> None:
        decoder, mtp = layer_specs(config, vp_stage)
        super().__init__(
            config=config,
            transformer_layer_spec=decoder,
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=int(architecture.rope_theta),
            mtp_block_spec=mtp,
            vp_stage=vp_stage,
        )
        self.temperature = run.rollout.rollout_temperature
        self.chunk_size = run.perf.log_probs_chunk_size
        if self.post_process:
            gradients.write_directly(self.output_layer.weight)
        if self.mtp_process and not run.mtp.enable_mtp_training:
            self.mtp.requires_grad_(False)
        self.routing, self.moe_layers = self._number_routers()

    def _number_routers(self) -> tuple[list[RoutingReplay], tuple[int, ...]]:
        """What the routers of this chunk's decoder are told by, and the number of each layer among those of the whole
        model that have experts. The MTP layer's router is told nothing."""
        layers = [layer for layer in self.decoder.layers if isinstance(layer, RoutedLayer)]
        routing = [layer.mlp.router.router_replay for layer in layers]
        for number, replay in enumerate(routing):
            replay.number = number
        return routing, tuple(sum(self.config.moe_layer_freq[: layer.layer_number - 1]) for layer in layers)

    def forward(self, pack: ModelInput) -> Tensor | ModelOutput:
        """Hidden states [T (/ TP with SP), 1, H] for the next pipeline stage, or the last stage's output."""
        embedded = self.embedding(pack.input_ids, pack.position_ids) if self.pre_process else None
        hidden = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=pack.sequences)
        if not self.post_process:
            return hidden
        log_probs, entropy = self._log_probs(hidden, self.output_layer.weight, pack.ask)
        mtp_log_probs = None
        if self.mtp_process and pack.mtp is not None:
            mtp_log_probs = self._mtp_log_probs(hidden.detach(), pack.mtp)
        return ModelOutput(log_probs, entropy, mtp_log_probs)

    def _mtp_log_probs(self, hidden: Tensor, pack: MtpInput) -> Tensor:
        """Log-probabilities [N_mtp] of the tokens after next. Hidden states, embedding and output head are detached:
        the MTP loss trains the MTP layer alone (arXiv:2412.19437 describes the layer)."""
        if pack.rows is not None:
            hidden = self._rows(hidden, pack.rows)
        with torch.no_grad():
            embedded = self.embedding(pack.next_ids, pack.position_ids)
        predicted, _, _ = self.mtp.layers[0](
            input_ids=pack.next_ids,
            position_ids=pack.position_ids,
            hidden_states=hidden.requires_grad_(),  # or recomputation would find nothing to differentiate
            attention_mask=None,
            packed_seq_params=pack.sequences,
            embedding=lambda input_ids, position_ids: embedded,
        )
        return self._log_probs(predicted, self.output_layer.weight.detach(), pack.ask)[0]

    def _rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rows [U] of a pack's hidden states [T (/ TP with SP), 1, H], spread over the ranks as these are."""
        if not self.config.sequence_parallel:
            return hidden.index_select(0, rows)
        group = self.pg_collection.tp
        whole = gather_from_sequence_parallel_region(hidden, group=group)
        return whole.index_select(0, rows.chunk(group.size())[group.rank()])

    def _log_probs(self, hidden: Tensor, weight: Tensor, ask: NextTokens) -> tuple[Tensor, Tensor]:
        tensor_parallel = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tensor_parallel)
        shard = VocabularyShard(group=tensor_parallel, start=tensor_parallel.rank() * weight.shape[0])
        return chunked_log_probs(
            hidden.squeeze(1).index_select(0, ask.index),
            weight,
            ask.targets,
            temperature=self.temperature,
            shard=shard,
            chunk_size=self.chunk_size,
        )


def build_chunks(run: Config, architecture: Architecture) -> list[PolicyModel]:
    """This rank's pipeline chunks (one, unless stages are interleaved) on the training device. Their weights are
    whatever was in memory, until a checkpoint's are loaded."""
    config = transformer_config(run, architecture)
    stages = (
        [None]
        if config.virtual_pipeline_model_parallel_size is None
        else range(config.virtual_pipeline_model_parallel_size)
    )
    return [PolicyModel(config, run, architecture, vp_stage=stage).to(training_device()) for stage in stages]
