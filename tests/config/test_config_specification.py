"""The specification's command lines, word for word."""

import re
import shlex
from pathlib import Path

import pytest

from recipe.config import Config, Resolved, resolve
from recipe.system.errors import UserError

MODEL = """
MODEL_ARGS=(
    --moe-layer-freq [0]*1+[1]*46
    --num-experts 64
    --moe-shared-expert-intermediate-size 1536
    --moe-router-topk 4
    --moe-grouped-gemm
    --moe-permute-fusion
    --moe-ffn-hidden-size 1536
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0
    --moe-router-load-balancing-type seq_aux_loss
    --moe-router-topk-scaling-factor 1.8
    --moe-aux-loss-coeff 0
    --moe-router-dtype fp32
    --make-vocab-size-divisible-by 64
    --num-layers 47
    --hidden-size 2048
    --ffn-hidden-size 10240
    --num-attention-heads 20
    --disable-bias-linear
    --swiglu
    --untie-embeddings-and-output-weights
    --position-embedding-type rope
    --no-position-embedding
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --qk-layernorm
    --multi-latent-attention
    --q-lora-rank 768
    --kv-lora-rank 512
    --qk-head-dim 192
    --v-head-dim 256
    --kv-channels 192
    --qk-pos-emb-head-dim 64
    --vocab-size 154880
    --rotary-base 1000000
    --no-rope-fusion
)
"""

CKPT = """
CKPT_ARGS=(
--hf-checkpoint /root/GLM-4.7-Flash/
--ref-load /root/GLM-4.7-Flash_torch_dist/
--load /root/GLM-4.7-Flash_slime/
--save /root/GLM-4.7-Flash_slime/
--save-interval 20
)
"""

PERF = """
PERF_ARGS=(
--tensor-model-parallel-size 1
--pipeline-model-parallel-size 1
--context-parallel-size 1
--expert-model-parallel-size 8
--expert-tensor-parallel-size 1
--recompute-granularity full
--recompute-method uniform
--recompute-num-layers 1
--use-dynamic-batch-size
--max-tokens-per-gpu 8192
)
"""

OPTIMIZER = """
OPTIMIZER_ARGS=(
--optimizer adam
--lr 1e-6
--lr-decay-style constant
--weight-decay 0.1
--adam-beta1 0.9
--adam-beta2 0.98
--optimizer-cpu-offload
--overlap-cpu-optimizer-d2h-h2d
--use-precision-aware-optimizer
)
"""

OPTIMIZER_MULTI_NODE = """
OPTIMIZER_ARGS=(
--optimizer adam
--lr 1e-6
--lr-decay-style constant
--weight-decay 0.1
--adam-beta1 0.9
--adam-beta2 0.98
# CPU Adam removed - distributed optimizer reduces memory per GPU
)
"""

SGLANG = """
SGLANG_ARGS=(
--rollout-num-gpus-per-engine 8
--sglang-mem-fraction-static 0.7
--sglang-enable-dp-attention
--sglang-dp-size 8
--sglang-enable-dp-lm-head
--sglang-moe-dense-tp-size 1
--sglang-cuda-graph-max-bs 16
--sglang-max-running-requests 64
)
"""

EAGLE = """
SGLANG_ARGS=(
# ... other args ...
# MTP speculative decoding (EAGLE)
--sglang-speculative-algorithm EAGLE
--sglang-speculative-num-steps 2
--sglang-speculative-eagle-topk 1
--sglang-speculative-num-draft-tokens 3
)
"""

SGLANG_24_GPUS = """
SGLANG_ARGS=(
--rollout-num-gpus-per-engine 24
--sglang-mem-fraction-static 0.7
--sglang-ep-size 24
--sglang-enable-dp-attention
--sglang-dp-size 3
--sglang-moe-dense-tp-size 1
--sglang-enable-dp-lm-head
--sglang-ep-num-redundant-experts 16
)
"""

MTP = """
# Add MTP layer count to model config
MODEL_ARGS+=(--mtp-num-layers 1)
# Enable MTP training
SPEC_ARGS=(
--enable-mtp-training
--mtp-loss-scaling-factor 0.2
)
"""

ROLLOUT = """
ROLLOUT_ARGS=(
--prompt-data /root/dapo-math-17k/dapo-math-17k.jsonl
--input-key prompt
--label-key label
--apply-chat-template
--rollout-shuffle
--rm-type deepscaler
--num-rollout 3000
--rollout-batch-size 32
--n-samples-per-prompt 8
--rollout-max-response-len 8192
--rollout-temperature 1
--global-batch-size 256
--balance-data
)
"""

GRPO = """
GRPO_ARGS=(
--advantage-estimator grpo
--use-kl-loss
--kl-loss-coef 0.00
--kl-loss-type low_var_kl
--entropy-coef 0.00
--eps-clip 0.2
--eps-clip-high 0.28
)
"""

EVAL = """
EVAL_ARGS=(
--eval-interval 20
--eval-prompt-data aime /root/aime-2024/aime-2024.jsonl
--n-samples-per-eval-prompt 16
--eval-max-response-len 16384
--eval-top-p 1
)
"""

MISC = """
MISC_ARGS=(
--attention-dropout 0.0
--hidden-dropout 0.0
--accumulate-allreduce-grads-in-fp32
--attention-softmax-in-fp32
--attention-backend flash
--moe-token-dispatcher-type alltoall
)
"""

ONE_NODE = """
--actor-num-nodes 1 \\
--actor-num-gpus-per-node 8 \\
--colocate
"""


def words(*blocks: str) -> list[str]:
    """The flags of shell arrays, as the shell would pass them."""
    text = re.sub(r"\w+\+?=\(|\)", " ", "\n".join(blocks)).replace("\\\n", " ")
    return shlex.split(text, comments=True)


@pytest.fixture
def launch(checkpoint: Path):
    """Resolves blocks of the specification with the checkpoint in a folder that exists here."""

    def resolve_blocks(*blocks: str) -> Resolved:
        return resolve([*words(*blocks), "--hf-checkpoint", str(checkpoint)])

    return resolve_blocks


def test_single_node_launch(launch) -> None:
    config = launch(ONE_NODE, MODEL, CKPT, ROLLOUT, OPTIMIZER, GRPO, PERF, EVAL, SGLANG, MISC).config

    assert (config.world_size, config.data_parallel_size, config.num_engines) == (8, 8, 1)
    assert config.cluster.colocate
    assert (config.samples_per_rollout, config.global_batch_size, config.steps_per_rollout) == (256, 256, 1)
    assert not config.needs_reference
    assert not config.needs_old_log_probs


def test_model_block(launch) -> None:
    model = launch(ONE_NODE, MODEL, ROLLOUT, OPTIMIZER, PERF, SGLANG).config.model

    assert model.moe_layer_freq == (0,) + (1,) * 46
    assert (model.num_layers, model.num_experts, model.vocab_size) == (47, 64, 154880)
    assert model.rotary_base == 1_000_000
    assert model.norm_epsilon == 1e-5
    assert model.add_bias_linear is False
    assert model.apply_rope_fusion is False
    assert model.untie_embeddings_and_output_weights is True


def test_checkpoint_block(launch) -> None:
    checkpoint = launch(ONE_NODE, CKPT, ROLLOUT, OPTIMIZER, PERF, SGLANG).config.checkpoint

    assert checkpoint.ref_load == Path("/root/GLM-4.7-Flash_torch_dist")
    assert checkpoint.load == checkpoint.save == Path("/root/GLM-4.7-Flash_slime")
    assert checkpoint.save_interval == 20


def test_perf_block(launch) -> None:
    perf = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG).config.perf

    assert (perf.tensor_model_parallel_size, perf.pipeline_model_parallel_size, perf.context_parallel_size) == (1, 1, 1)
    assert (perf.expert_model_parallel_size, perf.expert_tensor_parallel_size) == (8, 1)
    assert (perf.recompute_granularity, perf.recompute_method, perf.recompute_num_layers) == ("full", "uniform", 1)
    assert perf.use_dynamic_batch_size
    assert perf.max_tokens_per_gpu == 8192
    assert perf.balance_data, "stands in the specification's ROLLOUT_ARGS"


def test_optimizer_block(launch) -> None:
    optimizer = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG).config.optimizer

    assert (optimizer.optimizer, optimizer.lr, optimizer.lr_decay_style) == ("adam", 1e-6, "constant")
    assert (optimizer.weight_decay, optimizer.adam_beta1, optimizer.adam_beta2) == (0.1, 0.9, 0.98)
    assert optimizer.optimizer_cpu_offload
    assert optimizer.overlap_cpu_optimizer_d2h_h2d
    assert optimizer.use_precision_aware_optimizer


def test_sglang_block(launch) -> None:
    resolved = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG)

    assert resolved.config.sglang.rollout_num_gpus_per_engine == 8
    assert resolved.config.sglang.args == {
        "mem_fraction_static": 0.7,
        "enable_dp_attention": True,
        "dp_size": 8,
        "enable_dp_lm_head": True,
        "moe_dense_tp_size": 1,
        "cuda_graph_max_bs_decode": 16,  # renamed by SGLang
        "max_running_requests": 64,
    }
    assert any("--sglang-ep-size 8" in note for note in resolved.notes), "the text says EP=8, no flag of it does"


def test_eagle_block(launch) -> None:
    args = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG, EAGLE).config.sglang.args

    assert args["speculative_algorithm"] == "EAGLE"
    assert (args["speculative_num_steps"], args["speculative_eagle_topk"]) == (2, 1)
    assert args["speculative_num_draft_tokens"] == 3


def test_24_gpu_block_is_refused_with_the_valid_choices(launch) -> None:
    cluster = "--actor-num-nodes 3 --actor-num-gpus-per-node 8 --colocate"
    layout = """--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 3
        --decoder-last-pipeline-num-layers 15 --context-parallel-size 2 --expert-model-parallel-size 8"""
    with pytest.raises(UserError) as error:
        launch(cluster, ROLLOUT, OPTIMIZER_MULTI_NODE, layout, SGLANG_24_GPUS)
    sentences = str(error.value).splitlines()

    assert sentences[0] == "2 problems:"
    heads, experts = sentences[1:]
    assert "--sglang-dp-size 3" in heads
    assert "20 heads" in heads
    assert heads.endswith("6, 12 or 24")
    assert "--sglang-ep-num-redundant-experts 16 makes 80" in experts
    assert "8 (72 experts, 3 a GPU) or 32 (96 experts, 4 a GPU)" in experts


def test_16_gpu_layout_says_the_uneven_split(launch) -> None:
    two_nodes = "--actor-num-nodes 2 --actor-num-gpus-per-node 8 --colocate"
    layout = """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --context-parallel-size 2
        --expert-model-parallel-size 8"""
    with pytest.raises(UserError) as error:
        launch(two_nodes, ROLLOUT, OPTIMIZER_MULTI_NODE, layout, SGLANG)

    assert "--sequence-parallel" in str(error.value)
    assert "--decoder-last-pipeline-num-layers 23 makes it 24+23" in str(error.value)

    mended = layout + " --sequence-parallel --decoder-last-pipeline-num-layers 23"
    config = launch(two_nodes, ROLLOUT, OPTIMIZER_MULTI_NODE, mended, SGLANG).config
    assert (config.world_size, config.data_parallel_size, config.num_engines) == (16, 1, 2)


def test_mtp_block(launch) -> None:
    mtp = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG, MTP).config.mtp

    assert (mtp.mtp_num_layers, mtp.enable_mtp_training, mtp.mtp_loss_scaling_factor) == (1, True, 0.2)


def test_rollout_block(launch) -> None:
    config: Config = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG).config

    assert config.data.prompt_data == ((Path("/root/dapo-math-17k/dapo-math-17k.jsonl"), None),)
    assert (config.data.input_key, config.data.label_key) == ("prompt", "label")
    assert config.data.apply_chat_template
    assert config.data.rollout_shuffle
    rollout = config.rollout
    assert (rollout.rm_type, rollout.num_rollout, rollout.rollout_batch_size) == ("deepscaler", 3000, 32)
    assert (rollout.n_samples_per_prompt, rollout.global_batch_size) == (8, 256)
    assert (rollout.rollout_max_response_len, rollout.rollout_temperature) == (8192, 1.0)


def test_grpo_block(launch) -> None:
    resolved = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG, GRPO)
    grpo = resolved.config.grpo

    assert grpo.advantage_estimator == "grpo"
    assert grpo.use_kl_loss
    assert (grpo.kl_loss_coef, grpo.kl_loss_type, grpo.entropy_coef) == (0.0, "low_var_kl", 0.0)
    assert (grpo.eps_clip, grpo.clip_high) == (0.2, 0.28)
    assert any("reference model is not run" in note for note in resolved.notes)
    assert any("no old-log-prob pass" in note for note in resolved.notes)


def test_eval_block(launch) -> None:
    evaluation = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG, EVAL).config.eval

    assert evaluation.eval_interval == 20
    assert evaluation.eval_prompt_data == (("aime", Path("/root/aime-2024/aime-2024.jsonl")),)
    assert evaluation.eval_prompt_data[0].name == "aime"
    assert (evaluation.n_samples_per_eval_prompt, evaluation.eval_max_response_len) == (16, 16384)
    assert evaluation.eval_top_p == 1.0


def test_misc_block(launch) -> None:
    config = launch(ONE_NODE, ROLLOUT, OPTIMIZER, PERF, SGLANG, MISC).config

    assert (config.misc.attention_dropout, config.misc.hidden_dropout) == (0.0, 0.0)
    assert config.misc.accumulate_allreduce_grads_in_fp32
    assert config.misc.attention_softmax_in_fp32
    assert (config.perf.attention_backend, config.perf.moe_token_dispatcher_type) == ("flash", "alltoall")
