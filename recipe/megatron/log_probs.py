"""Token log-probabilities and entropies from hidden states, without ever holding the logits of a whole pack.

Letters: N selected tokens, H hidden size, V vocabulary of this tensor-parallel rank, C tokens of a chunk.
A chunk's logits [C, V] are formed, used and dropped; the backward pass forms them again. Only the last chunk's are
kept: the backward pass begins with it, so that no more than one chunk is ever there. Gradients of logits take their
place.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recipe.megatron.gradients import WeightGradient, add_product


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


def _row_sums(logits: Tensor, temperature: float, column: Tensor) -> Tensor:
    """[4, C] of logits [C, V]: each row's largest scaled logit m, and with z the row's scaled logits less m the sums of
    exp(z) and of exp(z) z, and z of the target if it lies in this shard."""
    if logits.is_cuda:
        from recipe.megatron import log_probs_kernel  # needs Triton, which is there with CUDA

        return log_probs_kernel.row_sums(logits, temperature, column)
    scaled = logits.float() / temperature
    largest = scaled.amax(dim=-1)
    shifted = scaled - largest[:, None]
    exponential = shifted.exp()
    at_target = torch.where(_at(column, logits), shifted, 0.0)
    return torch.stack([largest, exponential.sum(-1), (exponential * shifted).sum(-1), at_target.sum(-1)])


def _over_shards(own: Tensor, column: Tensor, vocabulary: int, shard: VocabularyShard) -> Tensor:
    """[4, C] of this shard -> of the whole vocabulary."""
    if shard.is_whole:
        return own
    largest = shard.reduce(own[0].clone(), dist.ReduceOp.MAX)
    fallen = own[0] - largest
    kept = fallen.exp()
    target = torch.where((column >= 0) & (column < vocabulary), own[3] + fallen, 0.0)
    sums = torch.stack([kept * own[1], kept * (own[2] + fallen * own[1]), target])
    return torch.cat([largest[None], shard.reduce(sums)])


def _replace_by_gradient(
    logits: Tensor,
    temperature: float,
    log_sum: Tensor,
    column: Tensor,
    grad_log_prob: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
) -> None:
    """Logits [C, V], in place; the others [C]: d log p_t / d z_j = [j = t] - p_j; dH / d z_j = -p_j (log p_j + H)."""
    if logits.is_cuda:
        from recipe.megatron import log_probs_kernel

        rows = (log_sum, column, grad_log_prob, entropy, grad_entropy)
        log_probs_kernel.replace_by_gradient(logits, temperature, *(one.contiguous() for one in rows))
        return
    log_probability = logits.float() / temperature - log_sum[:, None]
    spread = grad_log_prob[:, None] + grad_entropy[:, None] * (log_probability + entropy[:, None])
    gradient = torch.where(_at(column, logits), grad_log_prob[:, None], 0.0) - log_probability.exp() * spread
    logits.copy_(gradient / temperature)


def _at(column: Tensor, logits: Tensor) -> Tensor:
    """[C, V] True at each row's column, if it lies in this shard."""
    return torch.arange(logits.shape[1], device=logits.device) == column[:, None]


def _chunks(count: int, size: int) -> list[slice]:
    """Consecutive parts of `count` rows, all of them `size` long but the first."""
    return [slice(max(0, end - size), end) for end in range(count, 0, -size)][::-1] or [slice(0, 0)]


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
        parts, sums = _chunks(len(hidden), chunk_size), []
        logits = hidden.new_empty(0)
        for part in parts:
            del logits
            logits = torch.mm(hidden[part], weight.t())
            sums.append(_over_shards(_row_sums(logits, temperature, column[part]), column[part], len(weight), shard))
        largest, exponential, weighted, target = torch.cat(sums, dim=1)
        log_sum = exponential.log()
        entropy = log_sum - weighted / exponential
        ctx.save_for_backward(hidden, column, largest + log_sum, entropy, logits)
        ctx.weight, ctx.temperature, ctx.parts = weight, temperature, parts
        return target - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, column, log_sum, entropy, logits = ctx.saved_tensors
        weight, learns = ctx.weight, ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        gradient = WeightGradient.of(weight) if learns else None
        for part in reversed(ctx.parts):
            if part is not ctx.parts[-1]:
                torch.mm(hidden[part], weight.t(), out=logits.resize_(part.stop - part.start, len(weight)))
            _replace_by_gradient(
                logits,
                ctx.temperature,
                log_sum[part],
                column[part],
                grad_log_probs[part],
                entropy[part],
                grad_entropy[part],
            )
            torch.mm(logits, weight, out=grad_hidden[part])
            if gradient is not None:
                overwrite = gradient.is_blank and part is ctx.parts[-1]
                add_product(gradient.total, logits.t(), hidden[part], overwrite=overwrite)
        grad_weight = None if gradient is None else gradient.for_autograd(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


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
