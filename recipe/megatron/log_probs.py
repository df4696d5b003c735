"""Token log-probabilities and entropies from hidden states, without ever holding the logits of a whole pack.

Letters: N selected tokens, H hidden size, V vocabulary of this tensor-parallel rank, C tokens of a chunk.
A chunk's fp32 logits [C, V] are formed, used and dropped; the backward pass forms them again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """Which part of the vocabulary this rank's output layer computes, and over whom the rest is spread."""

    group: dist.ProcessGroup
    start: int

    @property
    def is_whole(self) -> bool:
        return self.group.size() == 1

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduces `tensor` in place over the ranks that share the vocabulary."""
        if not self.is_whole:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


@dataclass(frozen=True)
class _Chunk:
    log_softmax: Tensor
    """[C, V] fp32."""
    probability: Tensor
    """[C, V] fp32; empty unless entropy or gradients are asked for."""
    entropy: Tensor
    """[C]"""
    column: Tensor
    """[C] the target's column in this shard, clamped into it."""
    is_here: Tensor
    """[C] whether the target lies in this shard."""


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard, spread: bool
) -> _Chunk:
    logits = torch.mm(hidden, weight.t()).float()
    if temperature != 1.0:
        logits.div_(temperature)
    largest = shard.reduce(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
    logits.sub_(largest)
    log_softmax = logits.sub_(shard.reduce(logits.exp().sum(dim=-1, keepdim=True)).log())
    column = targets - shard.start
    is_here = (column >= 0) & (column < weight.shape[0])
    probability = log_softmax.exp() if spread else logits.new_empty(0)
    entropy = shard.reduce(-(probability * log_softmax).sum(dim=-1)) if spread else logits.new_empty(0)
    return _Chunk(log_softmax, probability, entropy, column.clamp(0, weight.shape[0] - 1), is_here)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        shard: VocabularyShard,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies = [], []
        for rows, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            chunk = _chunk(rows, weight, target, temperature, shard, spread=with_entropy)
            chosen = chunk.log_softmax.gather(1, chunk.column[:, None]).squeeze(1)
            log_probs.append(shard.reduce(chosen.masked_fill(~chunk.is_here, 0.0)))
            entropies.append(chunk.entropy)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.shard, ctx.chunk_size, ctx.with_entropy = temperature, shard, chunk_size, with_entropy
        return torch.cat(log_probs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            chunk = _chunk(hidden[part], weight, targets[part], ctx.temperature, ctx.shard, spread=True)
            grad = grad_log_probs[part, None]
            grad_logits = chunk.probability * -grad
            grad_logits.scatter_add_(1, chunk.column[:, None], grad * chunk.is_here[:, None])
            if ctx.with_entropy:
                # dH/dz_j = -p_j (log p_j + H)
                surprise = chunk.log_softmax + chunk.entropy[:, None]
                grad_logits.sub_(grad_entropy[part, None] * chunk.probability * surprise)
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            grad_weight.add_(torch.mm(grad_logits.t(), hidden[part]))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    shard: VocabularyShard,
    chunk_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under softmax(hidden @ weight.T / temperature), and the entropies.

    hidden [N, H], the same on every rank of the shard's group; weight [V, H]; targets [N] in the whole vocabulary.
    Returns two fp32 tensors: log-probabilities [N]; entropies [N], or an empty one if not `with_entropy`.
    The gradient of `hidden` is this shard's part only: sum it over the group.
    """
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperature, shard, chunk_size, with_entropy)
