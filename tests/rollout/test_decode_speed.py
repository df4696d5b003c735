"""Real SGLang under measurement, as `make tune MEASURE=1` has it."""

import pytest
from rollout_support import EngineUnderTest

from recipe.smoke import decode


@pytest.mark.sglang
def test_decoding_is_measured_on_a_running_engine(
    shared_sglang: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHORT", 4)
    monkeypatch.setattr(decode, "LONG", 40)
    engine = decode.Engine(shared_sglang.url, vocabulary=100, groups=1, seed=1)
    assert engine.cache_tokens > 1000
    found = list(engine.points([1, 2], [16]))
    assert [(point.sequences, point.context) for point in found] == [(1, 38), (2, 38)]
    assert all(point.seconds > 0 for point in found)
