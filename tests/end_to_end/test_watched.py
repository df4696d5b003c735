"""A run that is watched from its start to its end, and one that ends because it is enough."""

import json
import os
from pathlib import Path

import pytest
from browser import CHROMIUM, open_browser
from run_support import ONE_RANK, TinyInputs, arguments, leaves_nothing, run, samples, start
from test_server import watching

from recipe.run.html_report import FILE as REPORT
from recipe.run.journal import Journal
from recipe.run.report import main as report
from recipe.run.report import report as report_lines
from recipe.run.status import RunState, Status, read_status
from recipe.run.watch.answers import Answers
from recipe.system.shutdown import STOPPED_STATUS
from recipe.weights.checkpoints import latest

pytestmark = pytest.mark.slow


def test_a_run_ends_when_it_is_enough_saved_and_goes_on(inputs: TinyInputs, tmp_path: Path) -> None:
    """First because its gain will not be what was asked for, then before anything is started because its money is
    spent. `test_spending` spends it in the middle."""
    more = ("--num-rollout", "1000", "--price", "1000", "--custom-rm-path", "run_support:slow_reward")
    command = arguments(inputs, tmp_path, "enough", *more, "--save-interval", "1000", *ONE_RANK)
    going_on = [*command, "--load", str(tmp_path / "enough" / "checkpoints")]
    status, output = run([*command, "--target-gain", "1", "--target-gain-after", "3"])
    assert status == STOPPED_STATUS, output
    assert "after 3 rollouts (--target-gain-after) --target-gain 1 is not reached" in output
    assert "Traceback" not in output
    first = ended_saved(tmp_path / "enough")
    assert first.step == 3

    limit = 0.9 * first.dollars
    status, output = run([*going_on, "--max-dollars", str(limit)])
    assert status == STOPPED_STATUS, output
    assert f"--max-dollars is {limit:g}: nothing is started" in output
    assert "Ray" not in output
    second = ended_saved(tmp_path / "enough")
    assert second.step == first.step
    assert f"stopped, {second.step} steps in {second.seconds:.0f} s, " in next(report_lines(tmp_path / "enough"))


def ended_saved(directory: Path) -> Status:
    """What a run's directory tells of its end, which is one that it chose."""
    status, newest = read_status(directory), latest(directory / "checkpoints")
    assert status is not None
    assert status.state is RunState.STOPPED
    assert newest is not None
    assert newest.name == f"iter_{status.step:07}"
    assert json.loads((directory / "summary.json").read_text())["outcome"] == "stopped"
    return status


def test_what_a_run_leaves_is_what_the_page_shows(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name, answers = uninterrupted.name, Answers(uninterrupted)
    head, table = answers.head(name), answers.metrics(name, None, None)
    assert (head["state"], head["step"], head["total_steps"]) == ("finished", 6, 6)
    assert head["checkpoint"]["step"] == 6
    assert {"flag": "--lr", "recipe": "0.002", "run": "0.001"} in [
        {**row, "recipe": row["recipe"] if row["flag"] != "--lr" else "0.002"} for row in head["difference_from_recipe"]
    ]
    lines = Journal(uninterrupted / "metrics.jsonl").read()
    assert table["columns"]["reward"] == [line.get("reward") and pytest.approx(line["reward"], 1e-5) for line in lines]
    found = answers.samples(name, {})
    assert found["matches"] == len(samples(uninterrupted))
    for line in (0, 3):
        sample = answers.sample(name, 5, line)
        record = samples(uninterrupted)[5 * 16 + line]
        assert sample["response"] == record["response"]
        if sample["tokens"] is not None:
            tokens = sample["tokens"]
            assert len(tokens["pieces"]) == len(tokens["log_probs"]) == record["response_length"]
            mean = sum(tokens["log_probs"]) / len(tokens["log_probs"])
            assert mean == pytest.approx(record["mean_log_prob"], abs=1e-3)
            # in fp32 trainer and engine agree
            assert tokens["trainer_log_probs"] == pytest.approx(tokens["log_probs"], abs=2e-3)
    shown = [answers.sample(name, 5, line)["tokens"] for line in range(16)]
    assert sum(tokens is not None for tokens in shown) == 4
    course = answers.course(name, 5)
    assert max(course["running"]) == 16
    assert course["running"][-1] == 0

    monkeypatch.setattr("sys.argv", ["report", str(uninterrupted), "--with", str(uninterrupted)])
    monkeypatch.setattr("recipe.run.report.html_report", lambda *_: "the page")  # two runs of one name
    report()
    assert "difference +0.0000" in capsys.readouterr().out
    (uninterrupted / REPORT).unlink()


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("REQUIRE_CHROMIUM"),
    reason="no Chromium on this machine (Debian: apt-get install chromium)",
)
async def test_a_live_run_is_watched_from_its_start_until_it_is_killed(inputs: TinyInputs, tmp_path: Path) -> None:
    """Its responses are cut off, of which the page gives advice."""
    runs, may_import = tmp_path / "runs", tmp_path / "may-import"
    runs.mkdir()
    more = ("--num-rollout", "1000", "--rollout-max-response-len", "2", "--custom-rm-path", "held_import:slow_reward")
    step = "Number(document.querySelector('#step')?.innerText.match(/\\d+/)?.[0])"
    with leaves_nothing(str(tmp_path)) as take_note, watching(runs) as (_, url):
        async with open_browser(tmp_path / "profile") as page:
            await page.open(url)
            process = start(arguments(inputs, runs, "live", *more, *ONE_RANK), MAY_IMPORT=str(may_import))
            await page.until(
                "document.querySelector('#state')?.innerText.includes('starting')"
                " || document.querySelector('#runs')?.innerText.includes('starting')"
            )
            may_import.touch()
            await page.go("#/run/live")
            await page.until("document.querySelector('#state')?.innerText.includes('running')")
            await page.until(f"{step} >= 2")
            take_note(process)
            reward = "document.querySelector('#curves .chart[data-metric=reward] .reading')?.innerText"
            first = await page.until(reward)
            await page.until("!!document.querySelector('#advice li[data-rule=truncated]')")
            advice = await page.ask("document.querySelector('#advice li[data-rule=truncated]').innerText")
            assert "raise --rollout-max-response-len (now 2)" in advice
            await page.until(f"{reward} !== {json.dumps(first)}")  # steps in a row may have the same one
            await page.until(f"{step} >= 5")  # advice may come before the head is asked for again
            await page.go("#/run/live/samples")
            await page.until("document.querySelectorAll('#samples-results tr[data-rollout]').length > 4")
            process.kill()
            process.wait()
            await page.until("document.querySelector('#state').innerText.includes('died')")
            assert [request for request in page.requests() if not request.startswith((url, "data:"))] == []
            assert page.complaints() == []
    status = read_status(runs / "live")
    assert status is not None
    assert status.now().state is RunState.DIED
