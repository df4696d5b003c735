import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.data.prompts import Message, Prompt
from recipe.data.source import PromptSource
from recipe.system.errors import UserError


def prompts(count):
    return [Prompt(i, (Message("user", str(i)),), str(i), (i,), str(i)) for i in range(count)]


def drawn(source, batch_size, batches):
    return [draw.prompt.index for _ in range(batches) for draw in source.draw(batch_size)]


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 8), st.booleans())
def test_every_epoch_has_every_prompt_once_whatever_the_batch_size(count, batch_size, batches, shuffle):
    indices = drawn(PromptSource(prompts(count), shuffle=shuffle, seed=5), batch_size, batches)
    assert len(indices) == batches * batch_size
    for start in range(0, len(indices) - count + 1, count):
        assert sorted(indices[start : start + count]) == list(range(count))
    assert max(Counter(indices).values()) - min(Counter(indices).get(i, 0) for i in range(count)) <= 1


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 6), st.booleans())
def test_a_resumed_source_goes_on_as_if_it_had_never_stopped(count, batch_size, before, shuffle):
    uninterrupted = PromptSource(prompts(count), shuffle=shuffle, seed=5)
    stopped = PromptSource(prompts(count), shuffle=shuffle, seed=5)
    drawn(uninterrupted, batch_size, before)
    drawn(stopped, batch_size, before)
    resumed = PromptSource(prompts(count), shuffle=shuffle, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert drawn(resumed, batch_size, 4) == drawn(uninterrupted, batch_size, 4)


def test_without_shuffling_the_order_is_the_files():
    assert drawn(PromptSource(prompts(3), shuffle=False, seed=1), 2, 3) == [0, 1, 2, 0, 1, 2]


def test_seeds_and_epochs_have_their_own_order():
    indices = drawn(PromptSource(prompts(50), shuffle=True, seed=1), 50, 2)
    assert indices[:50] != indices[50:]
    assert indices[:50] != drawn(PromptSource(prompts(50), shuffle=True, seed=2), 50, 1)
    assert indices[:50] == drawn(PromptSource(prompts(50), shuffle=True, seed=1), 25, 2)


def test_a_state_among_other_prompts_is_refused():
    state = PromptSource(prompts(4), shuffle=True, seed=1).state_dict()
    changed = prompts(4)
    changed[2] = replace(changed[2], label="other")
    with pytest.raises(UserError, match="are not those that the checkpoint was written with"):
        PromptSource(changed, shuffle=True, seed=1).load_state_dict(state)


@given(
    st.integers(1, 12), st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 8))), min_size=1), st.booleans()
)
def test_every_draw_is_used_once_however_many_are_put_back(count, rounds, stops):
    source = PromptSource(prompts(count), shuffle=True, seed=5)
    used = []
    for batch_size, unused in rounds:
        draws = source.draw(batch_size)
        source.put_back(draw.number for place, draw in enumerate(draws) if place in unused)
        used += [draw for place, draw in enumerate(draws) if place not in unused]
        if stops:
            state = json.loads(json.dumps(source.state_dict()))
            source = PromptSource(prompts(count), shuffle=True, seed=5)
            source.load_state_dict(state)
    used += source.draw(30)
    assert sorted(draw.number for draw in used) == list(range(len(used)))
    in_order = PromptSource(prompts(count), shuffle=True, seed=5).draw(len(used))
    assert sorted(used, key=lambda draw: draw.number) == in_order
