#!/usr/bin/env bash
# GLM-4.7-Flash's architecture as megatron's flags, for scripts that source this file. It is compared with the
# checkpoint's config.json, so that a script meant for another model fails before anything starts.
# shellcheck disable=SC2034
MODEL_ARGS=(
    --num-layers 47
    --hidden-size 2048
    --ffn-hidden-size 10240
    --num-attention-heads 20
    --vocab-size 154880
    --make-vocab-size-divisible-by 64
    --untie-embeddings-and-output-weights
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --qk-layernorm

    --multi-latent-attention
    --q-lora-rank 768
    --kv-lora-rank 512
    --qk-head-dim 192
    --qk-pos-emb-head-dim 64
    --kv-channels 192
    --v-head-dim 256

    --position-embedding-type rope
    --no-position-embedding
    --rotary-base 1000000
    --rotary-percent 1.0

    --num-experts 64
    --moe-layer-freq "[0]*1+[1]*46"
    --moe-ffn-hidden-size 1536
    --moe-shared-expert-intermediate-size 1536
    --moe-router-topk 4
    --moe-router-num-groups 1
    --moe-router-group-topk 1
    --moe-router-topk-scaling-factor 1.8
    --moe-router-score-function sigmoid
    --moe-router-pre-softmax
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 0
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0
)
