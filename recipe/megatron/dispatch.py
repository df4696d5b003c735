"""megatron's mixture-of-experts layer over packs, whose sizes differ from rank to rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from recipe.megatron import permutation
from recipe.megatron.exchange import Exchange
from recipe.megatron.routing import RoutingReplay


class PackedMoELayer(MoELayer):
    """megatron's layer; its all-to-all dispatcher takes packs of any size, its all-gather one does with our padding."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection)
        self.router.router_replay = RoutingReplay()
        if config.moe_token_dispatcher_type == "allgather":
            self.token_dispatcher = PaddedAllGatherDispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
        elif pg_collection.ep.size() > 1:
            self.token_dispatcher = OverlappedDispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
        elif config.moe_permute_fusion and pg_collection.tp_ep.size() == 1:
            self.token_dispatcher = LocalDispatcher(config, pg_collection)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: None = None
    ) -> tuple[Tensor, None]:
        """hidden_states [T, 1, H] -> [T, 1, H], no bias. The shared experts are computed while rows are on their way to
        other ranks, unless they exchange rows themselves."""
        probs, routing_map = self.route(hidden_states)
        rows, row_probs = self.preprocess(hidden_states, probs, routing_map)
        if self.tp_group.size() > 1:
            shared = self.shared_experts_compute(hidden_states)
            rows, row_probs = self.dispatch(rows, row_probs)
        else:
            rows, row_probs = self.dispatch(rows, row_probs)
            shared = self.shared_experts_compute(hidden_states)
        output, _ = self.routed_experts_compute(rows, row_probs)
        return self.postprocess(self.combine(output), shared), None


class LocalDispatcher(MoETokenDispatcher):
    """Brings tokens [T, H] to experts that are all on this rank: nothing is sent, and the CPU does not wait for the
    GPU to count rows."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape, self.tokens_per_expert = tokens.shape, routing_map.sum(0)
        flat = tokens.view(-1, tokens.shape[-1])
        rows = len(flat) * self.config.moe_router_topk
        permuted, row_probs, self.permutation = permutation.permute(flat, probs, routing_map, rows)
        return permuted, row_probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden_states, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return permutation.unpermute(hidden_states, self.permutation).view(self.shape)


class OverlappedDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's all-to-all dispatcher, whose rows [R, H] and their probabilities [R] are on their way from
    `token_dispatch` to `dispatch_postprocess`. The counts of rows stay where the experts read them: brought back from
    the CPU, as megatron leaves them, they would hold it up until the rows have arrived."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Begins to send the rows of this rank's tokens."""
        self._maybe_dtoh_and_synchronize("before_ep_alltoall")
        sent, received = self.input_splits.tolist(), self.output_splits.tolist()
        self.exchanges = [Exchange(self.ep_group, sent, received) for _ in range(2)]
        return self.exchanges[0].begin(rows), self.exchanges[1].begin(probs)

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the rows of this rank's experts, and sorts them by expert."""
        of_rows, of_probs = self.exchanges
        del self.exchanges
        return super().dispatch_postprocess(of_rows.finish(rows), of_probs.finish(probs))


class PaddedAllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """megatron's all-gather dispatcher wants the same number of tokens T on all ranks that share experts: shorter packs
    are padded with tokens that no expert is asked for."""

    routing_map: Tensor
    """[T, experts] which experts a token is sent to."""

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [T, H] and probs [T, experts] of this rank -> those of all ranks, padded."""
        self.own_tokens = len(hidden_states)
        if self.tp_size > 1 or self.ep_size > 1:
            longest = torch.tensor(self.own_tokens, device=hidden_states.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
            missing = (0, 0, 0, int(longest) - self.own_tokens)
            hidden_states, probs = F.pad(hidden_states, missing), F.pad(probs, missing)
            self.routing_map = F.pad(self.routing_map, missing)
        return super().token_dispatch(hidden_states, probs)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The experts' sums for the tokens of all ranks, padded -> for this rank's [T, H]."""
        return super().token_combine(hidden_states)[: self.own_tokens]
