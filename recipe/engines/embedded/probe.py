"""What is measured at start: which row counts this machine treats alike."""

import logging

import torch
from torch import Tensor

from recipe.engines.embedded.cache import BLOCK
from recipe.engines.embedded.forward import CHUNK, RowModel

logger = logging.getLogger(__name__)


def measure_granule(model: RowModel, rows: int) -> int:
    """The smallest multiple of CHUNK such that a row's logits are the same bits in every multiple of it up to `rows`,
    wherever the row stands. A library may use other kernels for few rows, or for the last ones."""
    probe = _Probe(model, rows)
    granule = CHUNK
    while granule < rows and not probe.is_invariant(granule):
        granule *= 2
    granule = min(granule, rows)
    if granule == rows and not probe.is_invariant(granule):
        logger.warning("matrix products on this machine depend on a row's place: samples depend on their neighbours")
    return granule


class _Probe:
    """Random rows in the midst of a response, and the logits they must give."""

    def __init__(self, model: RowModel, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._model = model
        self._rows = rows
        self._tokens_R = torch.randint(model.vocab_size, (rows,), generator=generator)
        self._starts_R = torch.randint(BLOCK, (rows,), generator=generator)
        cache = model.new_cache(rows)
        cache.reserve(BLOCK)
        self._entries = torch.randn(cache.entries.shape, generator=generator)
        self._expected_RV = self._logits(torch.arange(rows))

    def is_invariant(self, granule: int) -> bool:
        """Whether any multiple of `granule` rows, in any order, gives the expected logits."""
        for count in range(granule, self._rows + 1, granule):
            for shift in (0, granule // 2 + 1):
                chosen = torch.arange(count).roll(shift)
                if not torch.equal(self._logits(chosen), self._expected_RV[chosen]):
                    return False
        return True

    @torch.inference_mode()
    def _logits(self, chosen: Tensor) -> Tensor:
        cache = self._model.new_cache(len(chosen))
        cache.reserve(BLOCK)
        cache.entries = self._entries[:, :, chosen]
        hidden = self._model.forward(self._tokens_R[chosen, None], self._starts_R[chosen], cache, first_row=0)
        return self._model.logits(hidden[:, 0])
