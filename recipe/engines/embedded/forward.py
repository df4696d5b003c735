"""The forward pass over rows of a latent key/value cache.

A row's result has the same bits whatever the other rows are, wherever the row stands and however long the others'
contexts are. Three things make it so. Matrix products run over row counts that are multiples of a granule for which
the library computes each row alike (`granule` measures it). The context is read in blocks of BLOCK positions whose
parts are added in order, so a longer neighbour only adds exact zeros. And prompts are read in pieces of CHUNK tokens,
whatever their length.

Letters: R rows, Q tokens a row, T = R * Q, B = BLOCK, D = C + P a cache entry, K experts a token; the others as in
`fused`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.engines.embedded.cache import BLOCK, LatentCache
from recipe.engines.embedded.fused import Attention, Experts, FusedModel, Mlp

CHUNK = 16
"""Tokens of a prompt that are read at once."""


class RowModel:
    """A model that reads and continues many rows at once."""

    def __init__(self, model: FusedModel, context_length: int, *, keeps_experts: bool = False) -> None:
        """`keeps_experts`: the cache keeps where each token was routed, too."""
        architecture = model.architecture
        self.keeps_experts = keeps_experts
        self._embedding, self._layers, self._norm, self._head = model.embedding, model.layers, model.norm, model.head
        self.vocab_size = architecture.vocab_size
        self._q_lora, self._latent = architecture.q_lora_rank, architecture.kv_lora_rank
        self._nope, self._rope = architecture.qk_nope_head_dim, architecture.qk_rope_head_dim
        self._heads = architecture.num_attention_heads
        self._scale = (self._nope + self._rope) ** -0.5
        self._top_k, self._routed_scale = architecture.num_experts_per_tok, architecture.routed_scaling_factor
        steps = torch.arange(0, self._rope, 2).float() / self._rope
        angles = torch.arange(context_length + CHUNK)[:, None] * (1.0 / architecture.rope_theta**steps)
        self._cos, self._sin = angles.cos(), angles.sin()

    def new_cache(self, rows: int) -> LatentCache:
        """An empty cache."""
        top_k = self._top_k if self.keeps_experts else 0
        return LatentCache(len(self._layers), rows, self._latent + self._rope, top_k)

    def forward(self, tokens_RQ: Tensor, starts_R: Tensor, cache: LatentCache, first_row: int) -> Tensor:
        """Hidden states [R, Q, H] after the final norm. Row r reads its tokens at positions starts_R[r] and on, after
        what row first_row + r of the cache holds, and is kept there."""
        rows, width = tokens_RQ.shape
        positions_RQ = starts_R[:, None] + torch.arange(width)
        blocks = cache.reserve(int(starts_R.max()) + width)
        masks = self._masks(positions_RQ, blocks)
        positions_T = positions_RQ.view(-1)
        rows_T = torch.arange(first_row, first_row + rows).repeat_interleave(width)
        places = (positions_T // BLOCK, rows_T, positions_T % BLOCK)
        turn = (self._cos[positions_T], self._sin[positions_T])
        hidden_TH = F.embedding(tokens_RQ.reshape(-1), self._embedding)
        for layer, entries, experts in zip(self._layers, cache.entries, cache.experts, strict=True):
            attention = layer.attention
            query, entry_TD = self._project(attention, layer.input_norm(hidden_TH), turn)
            entries[places] = entry_TD
            query = query.view(rows, width, self._heads, -1).transpose(1, 2).reshape(rows, self._heads * width, -1)
            attended = self._attend(query, entries[:blocks, first_row : first_row + rows], masks)
            attended = (
                attended.view(rows, self._heads, width, -1).transpose(0, 1).reshape(self._heads, rows * width, -1)
            )
            values_TX = torch.bmm(attended, attention.v_b).transpose(0, 1).flatten(1)
            hidden_TH = hidden_TH + F.linear(values_TX, attention.o)
            output_TH, chosen_TK = self._mlp(layer.mlp, layer.post_attention_norm(hidden_TH))
            hidden_TH = hidden_TH + output_TH
            if self.keeps_experts and chosen_TK is not None:
                experts[places] = chosen_TK.int()
        return self._norm(hidden_TH).view(rows, width, -1)

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """[R, vocabulary]."""
        return F.linear(hidden_RH, self._head)

    def _masks(self, positions_RQ: Tensor, blocks: int) -> list[Tensor]:
        """For each block [R, A * Q, B]: 0 where a token may look, -inf where not."""
        rows, width = positions_RQ.shape
        hidden = torch.arange(blocks * BLOCK) > positions_RQ[..., None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
        expanded = mask.expand(rows, self._heads, width, -1).reshape(rows, self._heads * width, -1)
        return list(expanded.split(BLOCK, dim=-1))

    def _project(self, weights: Attention, x_TH: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries in the latent space [T, A, D], and the cache's entries [T, D]."""
        sizes = [self._q_lora, self._latent, self._rope]
        q_TL, latent_TC, key_TP = F.linear(x_TH, weights.q_kv_a).split(sizes, dim=-1)
        entry_TD = torch.cat([weights.kv_norm(latent_TC), _rotate(key_TP, *turn)], dim=-1)
        q_TAX = F.linear(weights.q_norm(q_TL), weights.q_b).view(len(x_TH), self._heads, -1)
        content, position = q_TAX.split([self._nope, self._rope], dim=-1)
        latent_TAC = torch.bmm(content.transpose(0, 1), weights.k_b).transpose(0, 1)
        cos, sin = turn
        return torch.cat([latent_TAC, _rotate(position, cos[:, None], sin[:, None])], dim=-1), entry_TD

    def _attend(self, query: Tensor, entries: Tensor, masks: list[Tensor]) -> Tensor:
        """[R, A * Q, C]: attention of query [R, A * Q, D] to entries [blocks, R, B, D]."""
        scores = [
            torch.baddbmm(mask, query, block.transpose(1, 2), alpha=self._scale)
            for mask, block in zip(masks, entries, strict=True)
        ]
        largest = scores[0].amax(-1, keepdim=True)
        for score in scores[1:]:
            largest = torch.maximum(largest, score.amax(-1, keepdim=True))
        shares = [score.sub_(largest).exp_() for score in scores]
        total, attended = shares[0].sum(-1, keepdim=True), torch.bmm(shares[0], entries[0][..., : self._latent])
        for share, block in zip(shares[1:], entries[1:], strict=True):
            total += share.sum(-1, keepdim=True)
            attended += torch.bmm(share, block[..., : self._latent])
        return attended.div_(total)

    def _mlp(self, weights: Mlp | Experts, x_TH: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H], and which experts [T, K] were taken, where there are some."""
        if isinstance(weights, Mlp):
            gate, up = F.linear(x_TH, weights.gate_up).chunk(2, dim=-1)
            return F.linear(F.silu(gate).mul_(up), weights.down), None
        share_TE, chosen_TK = self._route(weights, x_TH)
        gate_up = F.linear(x_TH, weights.gate_up).view(*share_TE.shape, 2, -1)
        inner = F.silu(gate_up[:, :, 0]).mul_(gate_up[:, :, 1]).mul_(share_TE[..., None])
        return F.linear(inner.flatten(1), weights.down), chosen_TK

    def _route(self, weights: Experts, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E + 1]: each expert's weight for each token, 0 where it is not chosen; the shared one's is 1. And which
        were chosen, [T, K]."""
        scores = F.linear(x_TH, weights.router).sigmoid_()
        chosen = (scores + weights.router_bias).topk(self._top_k, dim=-1, sorted=False).indices
        share = scores.gather(1, chosen)
        share = share.div_(share.sum(-1, keepdim=True).add_(1e-20)).mul_(self._routed_scale)
        share_TE = torch.zeros(len(x_TH), scores.shape[1] + 1)
        share_TE[:, -1] = 1.0
        return share_TE.scatter_(1, chosen, share), chosen


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
