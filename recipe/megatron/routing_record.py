"""Where the trainer's own routers take the tokens of a pass, for the passes that repeat it (R2)."""

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from recipe.megatron.device import to_training_device
from recipe.megatron.microbatch import IntArray, MicroBatch
from recipe.megatron.model import PolicyModel
from recipe.messages import NOT_ROUTED, RoutedExperts, TrainSample


class RoutingRecord:
    """Of every pack that goes through the pipeline chunks of this rank, until `by_sample` is asked for. L, M and K: see
    `recipe.messages`."""

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        self._packs: dict[PolicyModel, list[tuple[IntArray, list[Tensor]]]] = {chunk: [] for chunk in chunks}
        self._record(True)

    def _record(self, records: bool) -> None:
        for model in self._packs:
            for replay in model.routing:
                replay.records, replay.taken = records, None

    def add(self, model: PolicyModel, batch: MicroBatch) -> None:
        """Takes down where the pack was taken that `model` has just read."""
        taken = [replay.taken for replay in model.routing if replay.taken is not None]
        self._packs[model].append((batch.rows, taken))

    def by_sample(self, microbatches: Sequence[Sequence[TrainSample]]) -> dict[int, RoutedExperts]:
        """[L - 1, M, K] of each sample, by its index; NOT_ROUTED in layers of other pipeline stages. A collective of
        the ranks that share the tokens of a pack."""
        self._record(False)
        found: dict[int, RoutedExperts] = {}
        for number, samples in enumerate(microbatches):
            whole = self._whole(number)
            ends = np.cumsum([sample.length for sample in samples])
            for sample, end in zip(samples, ends.tolist(), strict=True):
                found[sample.index] = whole[end - sample.length : end - 1].copy()
        return found

    def _whole(self, number: int) -> RoutedExperts:
        """[sum of lengths, M, K] of the samples of a pack, with the rows of all ranks that share it."""
        config = next(iter(self._packs)).config
        rows = next(iter(self._packs.values()))[number][0]
        shape = (len(rows), sum(config.moe_layer_freq), config.moe_router_topk)
        whole = np.full(shape, NOT_ROUTED, dtype=np.uint8)
        for model, packs in self._packs.items():
            rows, taken = packs[number]
            for layer, experts in zip(model.moe_layers, taken, strict=True):
                first = parallel_state.get_tensor_model_parallel_rank() * len(experts)
                here = (rows >= first) & (rows < first + len(experts))
                whole[here, layer] = experts.cpu().numpy()[rows[here] - first]
        group = parallel_state.get_tensor_and_context_parallel_group()
        if group.size() == 1:
            return whole
        over_ranks = to_training_device(whole)
        dist.all_reduce(over_ranks, op=dist.ReduceOp.MIN, group=group)  # NOT_ROUTED is more than any expert
        result: RoutedExperts = over_ranks.cpu().numpy()
        return result
