"""The key/value cache grows without forgetting, copies rows, and gives its memory back."""

import torch

from recipe.engines.embedded.cache import BLOCK, LatentCache


def test_growth_keeps_what_is_there() -> None:
    cache = LatentCache(layers=2, rows=3, entry_size=4)
    assert cache.reserve(5) == 1
    before = torch.randn(cache.entries.shape)
    cache.entries.copy_(before)
    assert cache.reserve(2 * BLOCK + 1) == 3
    assert torch.equal(cache.entries[:, :1], before)
    assert not cache.entries[:, 1:].any()


def test_copied_rows_are_equal_and_others_untouched() -> None:
    cache = LatentCache(layers=2, rows=5, entry_size=4)
    cache.reserve(BLOCK + 10)
    cache.entries.copy_(torch.randn(cache.entries.shape))
    before = cache.entries.clone()
    cache.copy(torch.tensor([4, 4]), torch.tensor([1, 3]), positions=BLOCK + 10)
    for target in (1, 3):
        assert torch.equal(cache.entries[:, :, target], before[:, :, 4])
    assert torch.equal(cache.entries[:, :, [0, 2, 4]], before[:, :, [0, 2, 4]])


def test_freed_memory_is_gone_and_can_be_had_again() -> None:
    cache = LatentCache(layers=2, rows=5, entry_size=4)
    cache.reserve(100)
    cache.free()
    assert cache.entries.untyped_storage().nbytes() == 0
    cache.reserve(1)
    assert not cache.entries.any()
