"""A step that was kept is read as it was, and what was not is a sentence."""

from pathlib import Path

import numpy as np
import pytest

from recipe.messages import TrainSample
from recipe.run.kept_steps import KeptStep, kept_step, path_of, read_step, steps_in, write_step
from recipe.system.errors import UserError


def step(seed: int) -> KeptStep:
    """Three samples, the second without routing, of two versions."""
    draw = np.random.default_rng(seed)
    samples, versions = [], []
    for number, response in enumerate((3, 1, 5)):
        length = 4 + response
        samples.append(
            TrainSample(
                index=10 * seed + number,
                tokens=draw.integers(0, 90, length),
                loss_mask=draw.random(response) > 0.3,
                rollout_log_probs=-draw.random(response).astype(np.float32),
                routed_experts=None if number == 1 else draw.integers(0, 8, (length - 1, 3, 2)).astype(np.uint8),
            )
        )
        versions.append([str(seed), *[str(seed + 1)] * (response - 1)])
    return kept_step(samples, versions)


def test_a_step_is_read_as_it_was_kept(tmp_path: Path) -> None:
    kept = step(7)
    write_step(tmp_path, 21, kept, newest=1)
    found = read_step(tmp_path, 21)
    for one, other in zip(found.samples, kept.samples, strict=True):
        assert (one.index, one.prompt.tolist()) == (other.index, other.prompt.tolist())
        for name in ("tokens", "loss_mask", "rollout_log_probs", "routed_experts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for one, other in zip(found.versions, kept.versions, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_newest_steps_stay(tmp_path: Path) -> None:
    for number in (1, 21, 41, 11):
        write_step(tmp_path, number, step(number), newest=2)
    assert steps_in(tmp_path) == [21, 41]


def test_what_was_not_kept_or_is_damaged_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not kept; those that are: none"):
        read_step(tmp_path, 3)
    write_step(tmp_path, 21, step(1), newest=1)
    with pytest.raises(UserError, match="those that are: 21"):
        read_step(tmp_path, 3)
    path = path_of(tmp_path, 21)
    whole = path.read_bytes()
    for damage in (b"", b"nonsense", whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="is damaged"):
            read_step(tmp_path, 21)


def test_the_trainers_own_routing_is_not_kept_as_the_engines(tmp_path: Path) -> None:
    whole = step(7)
    versions = [[str(one) for one in made] for made in whole.versions]
    write_step(tmp_path, 1, kept_step(whole.samples, versions, of_engine=False), newest=1)
    assert [sample.routed_experts for sample in read_step(tmp_path, 1).samples] == [None] * 3
