"""Draws from several prompt files."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.data.mixture import PromptFile, PromptMixture, Turns, open_draws, whole_weights
from recipe.data.prompts import Message, Prompt
from recipe.data.source import PromptSource
from recipe.system.errors import UserError


def prompts(count, name=""):
    return [Prompt(i, (Message("user", str(i)),), f"{name}{i}", (i,), str(i)) for i in range(count)]


def files(*sizes, weights=None):
    given = weights or [None] * len(sizes)
    named = zip("abcdefgh", sizes, given, strict=False)
    return [PromptFile(name, prompts(size, name), weight) for name, size, weight in named]


def texts(draws, count):
    return [draw.prompt.text for draw in draws.draw(count)]


whole = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 400)), min_size=1, max_size=8)
sizes = st.lists(st.integers(1, 12), min_size=2, max_size=5)


def test_one_file_is_drawn_from_as_it_was_before_there_could_be_several():
    draws = open_draws([PromptFile("train", prompts(5), 1.0)], shuffle=True, seed=5)
    assert [draw.prompt.index for draw in draws.draw(12)] == [1, 4, 2, 3, 0, 1, 0, 2, 3, 4, 3, 0]
    assert draws.state_dict() == {
        "drawn": 12,
        "put_back": [],
        "digest": "ce3f89f4042efb7b077d6954f25427b3f50556e3fa2d80db27998e9e5ef534cb",
    }
    assert draws.prompt_of(0).source == ""


@given(whole)
def test_after_any_number_of_draws_a_file_has_its_share_rounded_down_or_up(weights):
    turns, counts = Turns(weights), Counter()
    for number in range(min(2 * sum(weights), 1500)):
        file, own_number = turns.of_draw(number)
        assert own_number == counts[file]
        counts[file] += 1
        for place, weight in enumerate(weights):
            assert abs(counts[place] * sum(weights) - (number + 1) * weight) < sum(weights)


@given(whole, st.integers(0, 10**12))
def test_a_turn_is_found_wherever_it_is_and_without_those_before_it(weights, number):
    turns, place = Turns(weights), number % sum(weights)
    file, own_number = turns.of_draw(number)
    of_this_round = turns.of_draw(place)
    assert (file, own_number) == (of_this_round[0], of_this_round[1] + number // sum(weights) * weights[file])


def test_weights_are_what_is_written():
    assert whole_weights(files(1, 1, weights=[0.7, 0.3])) == [7, 3]
    assert whole_weights(files(1, 1, 1, weights=[0.333333, 0.333333, 0.333333])) == [1, 1, 1]
    assert whole_weights(files(1, 1, weights=[0.99999, 1e-05])) == [99999, 1]
    assert whole_weights(files(10, 25)) == [2, 5]


def test_shares_are_kept_from_the_first_draws_on():
    mixture = PromptMixture(files(3, 3, weights=[0.75, 0.25]), shuffle=True, seed=1)
    for _ in range(6):
        assert Counter(text[0] for text in texts(mixture, 8)) == {"a": 6, "b": 2}


@given(sizes, st.booleans())
def test_without_weights_every_prompt_of_every_file_comes_once_an_epoch(sizes, shuffle):
    mixture = PromptMixture(files(*sizes), shuffle=shuffle, seed=5)
    everything = sorted(prompt.text for file in files(*sizes) for prompt in file.prompts)
    for _ in range(3):
        assert sorted(texts(mixture, sum(sizes))) == everything


@given(sizes, st.integers(1, 9), st.integers(0, 60))
def test_a_file_keeps_its_order_whatever_is_beside_it(sizes, others, count):
    mixture = PromptMixture(files(*sizes), shuffle=True, seed=5)
    beside_others = PromptMixture([*files(*sizes)[:1], PromptFile("z", prompts(others))], shuffle=True, seed=5)
    orders = [[text for text in texts(one, count) if text.startswith("a")] for one in (mixture, beside_others)]
    common = min(map(len, orders))
    assert orders[0][:common] == orders[1][:common]
    epoch = orders[0][: sizes[0]]
    assert len(set(epoch)) == len(epoch)


def test_files_of_one_size_and_seed_have_orders_of_their_own():
    mixture = PromptMixture(files(40, 40), shuffle=True, seed=5)
    drawn = texts(mixture, 80)
    first, second = ([text[1:] for text in drawn if text.startswith(name)] for name in "ab")
    assert first != second
    assert drawn != texts(PromptMixture(files(40, 40), shuffle=True, seed=6), 80)


def test_without_shuffling_the_order_is_each_files():
    assert texts(PromptMixture(files(2, 4), shuffle=False, seed=1), 6) == ["b0", "a0", "b1", "b2", "a1", "b3"]


def test_prompts_tell_their_file():
    for draw in PromptMixture(files(3, 5), shuffle=True, seed=1).draw(20):
        assert draw.prompt.source == draw.prompt.text[0]


@given(sizes, st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 8))), min_size=1))
def test_a_resumed_mixture_goes_on_and_what_was_put_back_comes_again(sizes, rounds):
    def new():
        return PromptMixture(files(*sizes), shuffle=True, seed=5)

    source, used = new(), []
    for batch_size, unused in rounds:
        draws = source.draw(batch_size)
        source.put_back(draw.number for place, draw in enumerate(draws) if place in unused)
        used += [draw for place, draw in enumerate(draws) if place not in unused]
        state = json.loads(json.dumps(source.state_dict()))
        source = new()
        source.load_state_dict(state)
    used += source.draw(30)
    uninterrupted = new().draw(len(used))
    assert sorted(used, key=lambda draw: draw.number) == uninterrupted
    anew = new()
    assert [anew.prompt_of(draw.number) for draw in reversed(uninterrupted)] == [
        draw.prompt for draw in reversed(uninterrupted)
    ]


@pytest.mark.parametrize(
    "other",
    [
        files(3, 4, weights=[0.5, 0.5]),
        files(3, 4, weights=[0.7, 0.3])[::-1],
        files(3, 5, weights=[0.7, 0.3]),
        [PromptFile("a", prompts(3, "a"), 0.7), PromptFile("z", prompts(4, "b"), 0.3)],
        [*files(3, 4, weights=[0.7, 0.2]), PromptFile("c", prompts(1), 0.1)],
        files(3),
    ],
)
def test_a_state_of_other_files_or_weights_is_refused(other):
    state = open_draws(files(3, 4, weights=[0.7, 0.3]), shuffle=True, seed=1).state_dict()
    with pytest.raises(UserError, match="--prompt-data, or their weights, are not those that the checkpoint was"):
        open_draws(other, shuffle=True, seed=1).load_state_dict(state)
    open_draws(files(3, 4, weights=[0.7, 0.3]), shuffle=True, seed=1).load_state_dict(state)


def test_a_prompt_of_another_reward_is_another_prompt():
    plain, [first, *rest] = prompts(3), prompts(3)
    state = PromptSource(plain, shuffle=True, seed=1).state_dict()
    named = [replace(first, rm_type="dapo"), *rest]
    with pytest.raises(UserError, match="are not those that the checkpoint was written with"):
        PromptSource(named, shuffle=True, seed=1).load_state_dict(state)
