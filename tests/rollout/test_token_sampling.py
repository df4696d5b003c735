"""Sampling follows the distribution it is told, and a row's draw is its own."""

import numpy as np
import pytest
import torch

from recipe.engines.embedded.sampling import sample, scaled_log_probs, uniforms

ROWS, VOCABULARY = 20_000, 8


def _draw(
    log_probs_V: torch.Tensor, *, top_k: int = VOCABULARY, top_p: float = 1.0, greedy: bool = False
) -> torch.Tensor:
    """The share of each token among many draws."""
    draws = uniforms(np.arange(ROWS), np.full(ROWS, 17))
    tokens = sample(
        log_probs_V.expand(ROWS, -1),
        np.full(ROWS, greedy),
        np.full(ROWS, top_k),
        np.full(ROWS, top_p, np.float32),
        draws,
    )
    return torch.bincount(tokens, minlength=VOCABULARY) / ROWS


LOG_PROBS = torch.log_softmax(torch.tensor([0.3, 2.0, -1.0, 1.0, 0.0, -3.0, 1.5, 0.7]), 0)


def test_frequencies_are_the_probabilities() -> None:
    assert torch.allclose(_draw(LOG_PROBS), LOG_PROBS.exp(), atol=0.015)


def test_greedy_takes_the_likeliest() -> None:
    assert _draw(LOG_PROBS, greedy=True)[1] == 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, [1, 6]),
        ({"top_p": 0.5}, [1, 6]),
        ({"top_p": 0.01}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 6]),
    ],
)
def test_filters_keep_what_they_should_and_its_proportions(options: dict[str, float], allowed: list[int]) -> None:
    expected = torch.zeros(VOCABULARY)
    expected[allowed] = LOG_PROBS.exp()[allowed]
    assert torch.allclose(_draw(LOG_PROBS, **options), expected / expected.sum(), atol=0.015)


def test_a_neighbours_filter_changes_no_draw() -> None:
    log_probs = torch.log_softmax(torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), -1)
    draws, plain = uniforms(np.arange(64), np.arange(64)), np.full(64, 50)
    ones, no = np.ones(64, np.float32), np.zeros(64, np.bool_)
    alone = sample(log_probs, no, plain, ones, draws)
    filtered, greedy = plain.copy(), no.copy()
    filtered[::2], greedy[::4] = 3, True
    together = sample(log_probs, greedy, filtered, ones, draws)
    assert torch.equal(together[1::2], alone[1::2])


def test_uniforms_are_uniform_over_seeds_and_positions() -> None:
    by_seed = uniforms(np.arange(10_000), np.zeros(10_000, np.int64))
    by_position = uniforms(np.full(10_000, 123), np.arange(10_000))
    for draws in (by_seed, by_position):
        assert abs(np.histogram(draws, 20, (0, 1))[0] - 500).max() < 100
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(by_seed, by_position)[0, 1]) < 0.05


def test_any_seed_of_64_bits_is_taken() -> None:
    draws = uniforms(np.array([-(2**63), -1, 2**63 - 1]), np.zeros(3, np.int64))
    assert len(set(draws.tolist())) == 3
    assert ((draws >= 0) & (draws < 1)).all()


def test_log_probs_are_of_the_scaled_distribution() -> None:
    logits = torch.randn(2, 5)
    got = scaled_log_probs(logits, np.array([1.0, 0.5], np.float32))
    assert torch.equal(got[0], torch.log_softmax(logits[0], -1))
    assert torch.allclose(got[1], torch.log_softmax(logits[1] * 2, -1))
