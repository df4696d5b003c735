import pytest

from recipe.experience import sequence_weights

COUNTS = [3, 1, 0, 7]


@pytest.mark.parametrize("per_token", [True, False])
def test_weights_of_a_batch_add_up_to_one(per_token):
    weights = sequence_weights(COUNTS, per_token=per_token)
    assert sum(count * weight for count, weight in zip(COUNTS, weights, strict=True)) == pytest.approx(1)


def test_per_token_every_token_weighs_the_same_and_per_sequence_every_sequence():
    assert sequence_weights([1, 3], per_token=True) == [1 / 4, 1 / 4]
    assert sequence_weights([1, 3], per_token=False) == [1 / 2, 1 / 6]


@pytest.mark.parametrize("per_token", [True, False])
def test_a_sequence_without_trainable_tokens_changes_nothing(per_token):
    with_empty = sequence_weights(COUNTS, per_token=per_token)
    assert with_empty[2] == 0
    assert [w for w in with_empty if w] == sequence_weights([c for c in COUNTS if c], per_token=per_token)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_batch_with_nothing_to_train_on_weighs_nothing(per_token):
    assert sequence_weights([0, 0], per_token=per_token) == [0.0, 0.0]
    assert sequence_weights([], per_token=per_token) == []
