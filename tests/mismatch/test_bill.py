"""The parts of a difference add up to it, each in figures that are worked out by hand."""

import numpy as np
import pytest

from recipe.mismatch.bill import CURES, DECODING, ENGINE, OLDER, ROUTING, TRAINER, Bill, Part

WHOLE = np.array([0.3, -0.1, 0.0, 0.4])
ROUTED = np.array([0.3, 0.0, 0.0, 0.2])


def bill(*parts: tuple[str, np.ndarray]) -> Bill:
    return Bill.of(sum(part for _, part in parts), [Part(name, "", part) for name, part in parts])


def test_a_part_is_measured_and_its_share_is_of_the_whole() -> None:
    found = bill((ENGINE, WHOLE - ROUTED), (ROUTING, ROUTED))
    assert found.whole.mean == pytest.approx(0.2)
    assert found.whole.largest == pytest.approx(0.4)
    assert found.whole.share == 1
    engine, routing = found.parts
    assert (routing.mean, routing.largest) == (pytest.approx(0.125), pytest.approx(0.3))
    assert routing.share == pytest.approx((0.3 * 0.3 + 0.2 * 0.4) / (0.09 + 0.01 + 0.16))
    assert engine.share + routing.share == pytest.approx(1)
    assert routing.p99 == pytest.approx(np.quantile(ROUTED, 0.99))


@pytest.mark.parametrize("name", [OLDER, DECODING, ENGINE, TRAINER, ROUTING])
def test_the_cure_is_that_of_the_part_that_makes_most_of_the_kl(name: str) -> None:
    others = [other for other in CURES if other != name]
    found = bill((others[0], 0.1 * WHOLE), (name, WHOLE), (others[1], -0.3 * WHOLE))
    assert found.cheapest_cure == CURES[name]
    assert [line.split("  ")[0] for line in found.lines()][2] == name


def test_rounding_needs_no_cure() -> None:
    found = bill((ENGINE, 1e-6 * WHOLE), (ROUTING, 0 * WHOLE))
    assert found.cheapest_cure is None
    nothing = bill((ENGINE, 0 * WHOLE))
    assert (nothing.whole.mean, nothing.parts[0].share, nothing.cheapest_cure) == (0, 0, None)


def test_parts_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Bill.of(WHOLE, [Part(ROUTING, "", ROUTED)])
