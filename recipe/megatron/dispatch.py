"""megatron's mixture-of-experts layer over packs, whose sizes differ from rank to rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from recipe.megatron import permutation


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
        if config.moe_token_dispatcher_type == "allgather":
            self.token_dispatcher = PaddedAllGatherDispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
        elif config.moe_permute_fusion and pg_collection.tp_ep.size() == 1:
            self.token_dispatcher = LocalDispatcher(config, pg_collection)


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
