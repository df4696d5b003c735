"""Packed attention in padded grids, rows taken by index, and gradients written where megatron keeps them."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.megatron import attention, device, gradients
from recipe.megatron.attention import PackedAttention, PackedSequences
from recipe.megatron.gather import RowGather
from recipe.megatron.gradients import WeightGradient, add_product

CPU = torch.device("cpu")
HEADS, SIZE = 2, 8


def pack_of(groups: list[tuple[int, list[int]]]) -> PackedSequences:
    """Prompts and the lengths of their responses, which see the prompt's keys."""
    queries, keys, end = [], [], 0
    for prompt, responses in groups:
        prompt_rows = np.arange(end, end + prompt)
        queries.append(prompt)
        keys.append(prompt_rows)
        end += prompt
        for length in responses:
            queries.append(length)
            keys.append(np.concatenate([prompt_rows, np.arange(end, end + length)]))
            end += length
    return PackedSequences(
        query_lengths=tuple(queries),
        key_lengths=tuple(map(len, keys)),
        key_rows=np.concatenate(keys),
        gathered_rows=end,
    )


def outputs_and_gradients(pack: PackedSequences, kernel: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, pack.gathered_rows, HEADS, SIZE, generator=generator, dtype=torch.float64)
    query, key, value = (part.clone().requires_grad_() for part in rows[:3])
    attend = SimpleNamespace(softmax_scale=0.3)
    output = getattr(PackedAttention, kernel)(attend, query, key, value, pack)
    return [output, *torch.autograd.grad(output, (query, key, value), rows[3])]


GROUPS = st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 200), max_size=4)), min_size=1, max_size=3)


@given(GROUPS, st.booleans())
@settings(max_examples=25)
def test_grids_give_what_plain_products_give(groups: list[tuple[int, list[int]]], few_shapes: bool) -> None:
    """In one grid, and in those that suit cuDNN; gradients of a prompt's keys are summed over its responses."""
    whole = attention.SegmentGrids
    with mock.patch.object(attention, "SegmentGrids", lambda *args, **_: whole(*args, few_shapes=few_shapes)):
        found = outputs_and_gradients(pack_of(groups), "_fused")
    for ours, plain in zip(found, outputs_and_gradients(pack_of(groups), "_unfused"), strict=True):
        torch.testing.assert_close(ours.float(), plain.float(), rtol=1e-4, atol=1e-5)


def test_cudnn_meets_few_shapes() -> None:
    """It plans each for a tenth of a second: packs of any lengths up to 32,768 ask for few numbers of places."""
    from recipe.megatron.grids import _grid_shapes

    places = {_grid_shapes((length,), few_shapes=True)[0][1] for length in range(1, 32769)}
    assert len(places) < 130
    assert all(
        length <= _grid_shapes((length,), few_shapes=True)[0][1] < 1.07 * length + 64 for length in range(1, 32769)
    )


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=30))
def test_rows_taken_by_index_have_index_selects_gradient(index: list[int]) -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    gather = RowGather.of(np.array(index, dtype=np.int64), 6)
    weights = torch.randn(len(index), 3, dtype=torch.float64)
    taken = rows if gather is None else gather(rows)
    taken_by_torch = rows[torch.tensor(index, dtype=torch.int64).clamp(min=0)]
    torch.testing.assert_close(taken, taken_by_torch)
    real = torch.tensor([number >= 0 for number in index], dtype=torch.bool)[:, None]
    [found] = torch.autograd.grad(taken, rows, weights)
    [expected] = torch.autograd.grad(taken_by_torch, rows, weights * real)
    torch.testing.assert_close(found.float(), expected.float())


def test_sums_over_few_widths_are_compiled() -> None:
    """A compilation takes seconds, and each pack may share its prompts among another number of samples."""
    widths = set()
    for shares in range(2, 17):
        gather = RowGather.of(np.zeros(shares, dtype=np.int64), 2)
        assert gather is not None
        widths.add(gather.places.shape[1])
    assert widths == {2, 4, 8, 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_overwrites_whatever_was_there(dtype: torch.dtype) -> None:
    left, right = torch.randn(4, 6, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    total = torch.full((4, 5), torch.nan)
    add_product(total, left, right, overwrite=True)
    add_product(total, left, right, overwrite=False)
    torch.testing.assert_close(total, 2 * torch.mm(left, right).float())
    add_product(total, left[:, :0], right[:0], overwrite=True)
    assert not total.any()


def test_a_gradient_that_nothing_wrote_in_this_step_is_zero() -> None:
    """Not that of the step before."""
    device.prepare()
    written, unused = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    other = torch.nn.Parameter(torch.zeros(2))
    for parameter in (written, unused, other):
        parameter.main_grad = torch.ones_like(parameter)
    for parameter in (written, unused):
        gradients.write_directly(parameter)
    replica = SimpleNamespace(
        params_with_grad=[written, unused, other], bucket_groups=[], expert_parallel_bucket_groups=[]
    )
    for _ in range(2):
        gradients.begin(replica)
        for times in (1, 2):
            gradient = WeightGradient.of(written)
            add_product(gradient.total, torch.ones(2, 1), torch.ones(1, 3), overwrite=gradient.is_blank)
            assert (written.main_grad == times).all()
        gradients.finish([replica])
        assert not unused.main_grad.any()
        assert not other.main_grad.any()
