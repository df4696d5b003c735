"""Routing replay: routers take tokens where they are told to.

R3 (arXiv 2510.11370) tells them where the engine took the tokens, R2 (arXiv 2507.18071) where the old-log-prob pass
did. The gate's probabilities of the experts that are taken are the trainer's own, and gradients flow through them.

megatron's `RouterReplay` keeps a queue of packs for recomputation, which has to be told what is going on and in which
order; here a pack brings its routing along, to every pass over it.

Letters: T tokens of a pack on this rank, M layers with experts in this pipeline chunk, K experts a token, E experts.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from recipe.megatron.attention import PackedSequences, Routing
from recipe.megatron.device import training_device
from recipe.messages import NOT_ROUTED


class RoutingReplay:
    """What a router asks where to take the tokens, in the place of megatron's `RouterReplay`."""

    def __init__(self) -> None:
        self.number = 0
        """Of the router among those of its pipeline chunk."""
        self.records = False
        self.taken: Tensor | None = None
        """[T, K] uint8 where it took the tokens last, if it `records` that."""
        self._routing: Routing | None = None
        self.tokens = torch.zeros((), dtype=torch.long, device=training_device())
        """Response tokens that it was told where to take in passes with gradients, since `restart`."""
        self.elsewhere = torch.zeros_like(self.tokens)
        """Those of them that it would have taken to another expert, at least one."""

    def restart(self) -> None:
        """Counts from 0."""
        self.tokens.zero_()
        self.elsewhere.zero_()

    def follow(self, pack: PackedSequences) -> None:
        """Takes the next tokens where the pack says."""
        self._routing = pack.routing

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, E], the bias of the choice included -> the scores and numbers [T, K] of the experts taken."""
        assert default_compute_topk is not None
        values, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._routing is not None:
            told = self._routing.experts[self.number]
            if torch.is_grad_enabled():  # once a pack, whether or not the forward pass is repeated
                self._compare(chosen, told, self._routing.in_response)
            chosen = torch.where(told == NOT_ROUTED, chosen, told.long())
            # In the router's own order: where it agrees, replaying changes no bit.
            values, order = scores.gather(1, chosen).sort(1, descending=True)
            chosen = chosen.gather(1, order)
        if self.records:
            self.taken = chosen.to(torch.uint8)
        return values, chosen

    @torch.no_grad()
    def _compare(self, chosen: Tensor, told: Tensor, in_response: Tensor) -> None:
        known = (told[:, 0] != NOT_ROUTED) & in_response
        same = (chosen[:, :, None] == told[:, None, :]).any(2).all(1)
        self.tokens += known.sum()
        self.elsewhere += (known & ~same).sum()


class RoutedLayer(TransformerLayer):
    """megatron's layer with experts, whose router follows the pack that goes through, also when it is recomputed."""

    def forward(self, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any) -> Any:
        """megatron's own."""
        self.mlp.router.router_replay.follow(packed_seq_params)
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def routing_disagreement(replays: Iterable[RoutingReplay]) -> float | None:
    """Share of response tokens that a router would have taken to another expert, mean over the layers of all ranks;
    None where no router was told anything. A collective of all ranks."""
    counts = torch.zeros(2, dtype=torch.float64, device=training_device())
    for replay in replays:
        counts += torch.stack([replay.elsewhere, replay.tokens])
    dist.all_reduce(counts)
    elsewhere, tokens = counts.tolist()
    return elsewhere / tokens if tokens else None
