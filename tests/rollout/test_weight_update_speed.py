"""A weight update under measurement, as `make tune MEASURE=1` has it: from processes of its own to an engine that
runs."""

import pytest
from rollout_support import EngineUnderTest

from recipe.config import Resolved, resolve
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.time_plan import Work
from recipe.smoke import weight_update
from recipe.system.errors import UserError

LENGTHS = Lengths.log_normal(6, 0.5, 12)


def resolved_of(engine: EngineUnderTest, *flags: str) -> Resolved:
    words = ["--recipe", "tiny", "--hf-checkpoint", str(engine.checkpoint), "--prompt-data", "/dev/null"]
    return resolve([*words, "--update-weight-buffer-size", "1000000", *flags])


def gpus(count: int) -> Machine:
    return Machine.described("H100", count, "1TB", None, 2.5)


@pytest.mark.usefixtures("forked_together")
@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
def test_an_update_of_all_weights_is_timed(embedded: EngineUnderTest, transfer: str) -> None:
    """As often as it is repeated the engine takes it: it has the last one's version, and other weights."""
    before = embedded.request("POST", "/weights_checker", {"action": "checksum"})[1]
    resolved = resolved_of(embedded, "--update-weight-transfer", transfer)
    [found] = weight_update.measure_update(resolved, gpus(2), LENGTHS, embedded.url)
    assert found.kind.work is Work.UPDATE_WEIGHTS
    assert 0 < found.seconds < 60
    assert 0 < found.planned_best < found.planned_worst
    last = f"random {weight_update.UPDATES - 1}"
    assert embedded.request("GET", "/model_info")[1]["weight_version"] == last
    after = embedded.request("POST", "/weights_checker", {"action": "checksum"})[1]
    [old], [new] = ([rank["checksums"] for rank in told["ranks"]] for told in (before, after))
    assert old.keys() == new.keys()
    assert all(old[name] != new[name] for name in old)


@pytest.mark.usefixtures("forked_together")
def test_an_engine_that_is_not_there_is_a_sentence(embedded: EngineUnderTest) -> None:
    with pytest.raises(UserError, match=r"a weight update cannot be measured: .*127\.0\.0\.1:9"):
        weight_update.measure_update(resolved_of(embedded), gpus(1), LENGTHS, "http://127.0.0.1:9")


@pytest.mark.parametrize(("transfer", "count"), [("disk", 8), ("distributed", 1)])
def test_what_cannot_be_measured_here_is_left_out_and_told(
    embedded: EngineUnderTest, capsys: pytest.CaptureFixture[str], transfer: str, count: int
) -> None:
    resolved = resolved_of(embedded, "--update-weight-transfer", transfer)
    assert weight_update.measure_update(resolved, gpus(count), LENGTHS, "http://127.0.0.1:9") == ()
    assert "a weight update is not measured: " in capsys.readouterr().out
