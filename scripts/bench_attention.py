#!/usr/bin/env python3
"""torch's attention kernels on packs of GLM-4.7-Flash's heads (20 of 256), forward and backward, by segment length.

scripts/bench_attention.py [--tokens 8192]
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from glm_flash import environment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from recipe.smoke.rates import median_ms

HEADS, SIZE = 20, 256
Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def varlen(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """One call for the whole pack."""
    borders = torch.arange(0, query.shape[0] + 1, length, dtype=torch.int32, device="cuda")
    output = varlen_attn(query, key, value, borders, borders, length, length, window_size=(-1, 0))
    assert isinstance(output, Tensor)
    return output


def batched(backend: SDPBackend) -> Kernel:
    """SDPA on [segments, heads, length, size]: what a pack of equal lengths allows."""

    def run(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        q, k, v = (rows.view(-1, length, HEADS, SIZE).transpose(1, 2) for rows in (query, key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(query.shape)

    return run


def looped(backend: SDPBackend) -> Kernel:
    """SDPA segment by segment: what a pack of any lengths allows."""

    def run(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        outputs = []
        with sdpa_kernel(backend):
            for segment in zip(query.split(length), key.split(length), value.split(length), strict=True):
                q, k, v = (part.transpose(0, 1)[None] for part in segment)
                outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    return run


def ragged(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """cuDNN on the pack as it lies."""
    borders = torch.arange(0, query.shape[0] + 1, length, dtype=torch.int32, device="cuda")
    arguments = (None, borders, borders, length, length, True, 0.0, True, False)
    return torch.ops.aten._cudnn_attention_forward(query, key, value, *arguments)[0]


KERNELS: dict[str, Kernel] = {
    "varlen": varlen,
    "cudnn ragged": ragged,
    "cudnn batched": batched(SDPBackend.CUDNN_ATTENTION),
    "cudnn looped": looped(SDPBackend.CUDNN_ATTENTION),
    "flash batched": batched(SDPBackend.FLASH_ATTENTION),
    "flash looped": looped(SDPBackend.FLASH_ATTENTION),
}


def measure(kernel: Kernel, tokens: int, length: int) -> tuple[float, float, Tensor]:
    """Milliseconds forward, forward and backward; the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(tokens, HEADS, SIZE, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    )
    upstream = torch.randn_like(q)

    def both() -> None:
        kernel(q, k, v, length).backward(upstream)

    with torch.no_grad():
        forward = median_ms(lambda: kernel(q, k, v, length))
        output = kernel(q, k, v, length)
    return forward, median_ms(both), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    print(environment())
    print(
        f"{'segments':14}{'kernel':16}{'forward ms':>12}{'TFLOP/s':>10}{'f+b ms':>10}{'TFLOP/s':>10}{'difference':>12}"
    )
    length = tokens
    while length >= 256:
        flops = 2 * tokens * length * HEADS * SIZE  # two products of [length, length, size], half of each masked
        reference: Tensor | None = None
        for name, kernel in KERNELS.items():
            try:
                forward, both, output = measure(kernel, tokens, length)
            except RuntimeError as error:
                print(f"{tokens // length:4} x {length:<7}{name:16}{str(error).splitlines()[0][:80]}")
                continue
            reference = output if reference is None else reference
            difference = (output - reference).abs().max().item()
            rates = f"{forward:12.3f}{flops / forward / 1e9:10.0f}{both:10.3f}{3.5 * flops / both / 1e9:10.0f}"
            print(f"{tokens // length:4} x {length:<7}{name:16}{rates}{difference:12.4f}", flush=True)
        length //= 2


if __name__ == "__main__":
    main()
