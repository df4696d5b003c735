"""Token log-probabilities and entropies from hidden states, without ever holding the logits of a whole pack.

Letters: N selected tokens, H hidden size, V vocabulary of this tensor-parallel rank, C tokens of a chunk.
A chunk's logits [C, V] are formed, used and dropped; the backward pass forms them again.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recipe.megatron.fusion import fused


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


@fused
def _largest(logits: Tensor, temperature: float) -> Tensor:
    """Of each row of logits [C, V]: [C]."""
    return logits.amax(dim=-1).float() / temperature


@fused
def _sums(logits: Tensor, temperature: float, largest: Tensor, column: Tensor) -> Tensor:
    """[3, C] sums over this shard, with z the row's scaled logits less the row's largest: of exp(z), of exp(z) z, and z
    of the target if it lies here."""
    shifted = logits.float() / temperature - largest[:, None]
    exponential = shifted.exp()
    at_target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    return torch.stack(
        [exponential.sum(-1), (exponential * shifted).sum(-1), torch.where(at_target, shifted, 0.0).sum(-1)]
    )


@fused
def _grad_logits(
    logits: Tensor,
    temperature: float,
    log_sum: Tensor,
    column: Tensor,
    grad_log_prob: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """[C, V] in the type of logits: d log p_t / d z_j = [j = t] - p_j; dH / d z_j = -p_j (log p_j + H)."""
    log_probability = logits.float() / temperature - log_sum[:, None]
    at_target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    spread = grad_log_prob[:, None] + grad_entropy[:, None] * (log_probability + entropy[:, None])
    gradient = torch.where(at_target, grad_log_prob[:, None], 0.0) - log_probability.exp() * spread
    return (gradient / temperature).to(logits.dtype)


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
    ) -> tuple[Tensor, Tensor]:
        column = targets - shard.start
        chunks = []
        for rows, columns in zip(hidden.split(chunk_size), column.split(chunk_size), strict=True):
            logits = torch.mm(rows, weight.t())
            largest = shard.reduce(_largest(logits, temperature), dist.ReduceOp.MAX)
            chunks.append(torch.cat([largest[None], shard.reduce(_sums(logits, temperature, largest, columns))]))
        largest, exponential, weighted, target = torch.cat(chunks, dim=1)
        log_sum = exponential.log()
        entropy = log_sum - weighted / exponential
        ctx.save_for_backward(hidden, weight, column, largest + log_sum, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return target - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, column, log_sum, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            logits = torch.mm(hidden[part], weight.t())
            grad_logits = _grad_logits(
                logits,
                ctx.temperature,
                log_sum[part],
                column[part],
                grad_log_probs[part],
                entropy[part],
                grad_entropy[part],
            )
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            _add_product(grad_weight, grad_logits.t(), hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to the fp32 `total`."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right))


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    shard: VocabularyShard,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under softmax(hidden @ weight.T / temperature), and the entropies.

    hidden [N, H], the same on every rank of the shard's group; weight [V, H]; targets [N] in the whole vocabulary.
    Returns two fp32 tensors [N].
    The gradient of `hidden` is this shard's part only: sum it over the group.
    """
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperature, shard, chunk_size)
