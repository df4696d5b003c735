"""Weights leave the trainer in buckets that fit, and none of SGLang's pairs is parted."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.rollout.weights_sync import buckets

LAYER = (
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.o_proj",
    "mlp.gate",
)


@given(sizes=st.lists(st.integers(1, 40), min_size=18, max_size=18), limit=st.integers(4, 200))
def test_buckets_fit_and_keep_pairs_together(sizes: list[int], limit: int) -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in LAYER]
    weights = [(name, torch.zeros(size)) for name, size in zip(names, sizes, strict=True)]
    found = list(buckets(weights, limit))
    assert [name for bucket in found for name, _ in bucket] == names
    for bucket in found:
        inside = {name for name, _ in bucket}
        for layer in range(3):
            pair = {f"model.layers.{layer}.self_attn.{part}.weight" for part in ("q_a_proj", "kv_a_proj_with_mqa")}
            assert len(pair & inside) in (0, 2)
        if len(bucket) > 4:
            assert sum(tensor.nbytes for _, tensor in bucket[:-4]) <= limit
