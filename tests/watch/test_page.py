"""The page of `make watch` and of a report in a real browser."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import axe_playwright_python
import pytest
from browser import CHROMIUM, Page, open_browser
from made_up_run import write_run
from test_answers import HOSTILE, hostile_run
from test_server import watching

from recipe.run.html_report import html_report
from recipe.run.journal import Journal
from recipe.run.shown_tokens import ShownTokens, write_tokens
from recipe.run.status import RunState, StatusWriter
from recipe.system.ports import reserve_port

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
STEPS, SAMPLES = 60, 16
WIDTHS = (1280, 390)
VIEWS = {
    "runs": "#/",
    "curves": "#/run/long",
    "time": "#/run/long/time",
    "step": "#/run/long/step/3",
    "samples": "#/run/long/samples",
    "sample": f"#/run/long/samples/{STEPS - 1}/2",
    "details": "#/run/long/details",
}
SHOWN = {
    "runs": "document.querySelectorAll('#runs tr[data-run]').length == 2",
    "curves": "document.querySelectorAll('#curves .chart canvas').length > 0",
    "time": "!!document.querySelector('#timeline .chart') && !!document.querySelector('#phases canvas')",
    "step": "document.querySelector('#step-values')?.innerText.toLowerCase().includes('reward')",
    "samples": "document.querySelectorAll('#samples-results tr[data-rollout]').length == 50",
    "sample": "document.querySelectorAll('#sample-text .token').length == 300",
    "details": "!!document.querySelector('#versions')",
}
"""What each view has when it is there."""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("REQUIRE_CHROMIUM"),
        reason="no Chromium on this machine (Debian: apt-get install chromium)",
    ),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "long", STEPS, SAMPLES, characters=200)
    hostile_run(folder / "bad")
    return folder


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with open_browser(tmp_path / "profile") as opened:
        yield opened


async def findings(page: Page) -> list[str]:
    """What an accessibility checker finds serious."""
    await page.ask(AXE.read_text())
    await page.ask("window.found = null; axe.run().then(result => { window.found = result.violations })")
    violations = json.loads(await page.until("window.found && JSON.stringify(window.found)"))
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in violations
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def foreign_requests(page: Page, url: str) -> list[str]:
    return [request for request in page.requests() if not request.startswith((url, "data:"))]


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
async def test_every_view_at_both_widths(runs: Path, page: Page, *, is_dark: bool) -> None:
    """It is there, is no wider than the window, and an accessibility checker has nothing serious to say."""
    with watching(runs) as (_, url):
        await page.dark(is_dark=is_dark)
        await page.open(url)
        for width in WIDTHS:
            await page.resize(width)
            for view, address in VIEWS.items():
                await page.go(address)
                await page.until(SHOWN[view])
                assert await page.ask(OVERFLOW) <= 0, (view, width)
                assert await findings(page) == [], (view, width)
                assert len(await page.screenshot()) > 10_000
        assert foreign_requests(page, url) == []
        assert page.complaints() == []


async def test_a_sample_is_found_and_opened_by_keyboard(runs: Path, page: Page) -> None:
    async def press(key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await page.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" * (code == 13),
            )

    with watching(runs) as (_, url):
        await page.open(f"{url}#/run/long/samples")
        await page.until(SHOWN["samples"])
        await page.ask("document.querySelector('#filter-text').focus()")
        await page.call("Input.insertText", text="What is 7 + 5?")
        await press("Enter", 13)
        await page.until("document.querySelectorAll('#samples-results tr[data-rollout]').length == 1")
        for _ in range(40):
            await press("Tab", 9)
            if await page.ask("!!document.activeElement.closest('#samples-results tr[data-rollout]')"):
                break
        await press("Enter", 13)
        text = await page.until("document.querySelector('#sample-text')?.textContent")
        record = json.loads((runs / "long" / "rollouts" / "000006.jsonl").read_text().splitlines()[5])
        assert text == record["response"]
        assert record["label"] in await page.ask("document.querySelector('#grade-text').innerText")
        assert await page.ask("document.querySelectorAll('#group tr').length") >= 8


async def test_tokens_are_coloured_by_three_numbers(runs: Path, page: Page) -> None:
    with watching(runs) as (_, url):
        await page.open(url + VIEWS["sample"])
        await page.until(SHOWN["sample"])
        kept = json.loads((runs / "long" / "tokens" / f"{STEPS - 1:06}.jsonl").read_text().splitlines()[2])
        assert await page.ask("document.querySelector('#sample-text').textContent") == "".join(kept["pieces"])
        colours = (
            "[...document.querySelectorAll('#sample-text .token')].map(e => getComputedStyle(e).backgroundColor).join()"
        )
        seen = set()
        choices = await page.ask("[...document.querySelectorAll('#colouring input')].map(e => e.value)")
        for choice in choices:
            await page.ask(f"document.querySelector('#colouring input[value={json.dumps(choice)}]').click()")
            seen.add(await page.ask(colours))
        assert len(seen) == len(choices) == 4


async def test_hostile_text_changes_nothing(runs: Path, page: Page) -> None:
    with watching(runs) as (_, url):
        await page.resize(390)
        await page.open(f"{url}#/run/bad/samples")
        await page.until("document.querySelectorAll('#samples-results tr[data-rollout]').length == 8")
        assert await page.ask(OVERFLOW) <= 0
        for number in range(len(HOSTILE)):
            await page.go(f"#/run/bad/samples/0/{number}")
            whole = HOSTILE[number] if len(HOSTILE[number]) < 10_000 else HOSTILE[number][:1000]
            await page.until(f"document.querySelector('#sample-text')?.textContent.includes({json.dumps(whole)})")
            assert await page.ask(OVERFLOW) <= 0
            assert await page.ask("document.querySelectorAll('main script, main img, main iframe').length") == 0
        assert foreign_requests(page, url) == []
        assert page.complaints() == []


async def test_curves_grow_and_a_cut_back_run_is_drawn_anew(tmp_path: Path, page: Page) -> None:
    """A run that goes on, as far as its files tell."""
    run = tmp_path / "runs" / "long"
    write_run(run, 12, 8, characters=20)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:5]))
    (run / "plan.json").write_text(json.dumps({"time": {"step_s": [0.011, 0.017]}, "gpu": None, "host": {}}))
    status = StatusWriter(run, total_steps=12, gpus=8, price=2.5)
    status.tell(RunState.RUNNING, "rollout")
    status.count(4)
    last = "document.querySelector('#curves .chart[data-metric=reward] .plot')?.getAttribute('aria-label')"
    with watching(run.parent) as (_, url):
        await page.open(f"{url}#/run/long")
        first = await page.until(f"/[0-9]/.test({last}) && {last}")
        for words in ("step 5", "planned 0.011 to 0.017 s", "planned under $0.01"):
            await page.until(f"document.querySelector('#run-header').innerText.includes({json.dumps(words)})")
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b"".join(lines[5:]))
        status.count(12)
        await page.until(f"{last} != {json.dumps(first)}")
        Journal(run / "metrics.jsonl").keep(lambda line: line["step"] < 5)
        status.count(4)
        await page.until(f"{last} == {json.dumps(first)}")
        status.close(RunState.FINISHED, "all rollouts are done")
        await page.until("document.querySelector('#state').innerText.includes('finished')")
        assert page.complaints() == []


async def test_the_page_says_when_its_server_is_gone_and_recovers(runs: Path, page: Page) -> None:
    with reserve_port() as reservation:  # nobody else gets it meanwhile
        port = ("--port", str(reservation.getsockname()[1]))
        with watching(runs, *port) as (_, url):
            await page.open(f"{url}#/run/long")
            await page.until(SHOWN["curves"])
        await page.until("document.querySelector('#connection').innerText.includes('does not answer')")
        with watching(runs, *port):
            await page.until("!document.querySelector('#connection').innerText")
            assert await page.ask(SHOWN["curves"])


async def test_a_report_needs_nothing_else(runs: Path, tmp_path: Path, page: Page) -> None:
    difference = {"set": "aime", "a": 0.6, "b": 0.4, "step_a": 60, "step_b": 40, "problems": 30, "mean": 0.2}
    difference |= {"low": 0.1, "high": 0.3, "p_value": 0.01, "p_value_signs": 0.02}
    found = {"with": "other", "difference": [difference], "notes": ["a note"], "dollars": [1.0, 2.0], "hours": [1, 2]}
    write_run(tmp_path / "other", 40, 8)
    report = tmp_path / "report.html"
    report.write_text(html_report(runs / "long", tmp_path / "other", found), encoding="utf-8")
    await page.open(report.as_uri())
    await page.until("document.querySelectorAll('.chart canvas').length > 2")
    told = await page.ask("document.body.innerText")
    for words in ("long", "other", "finished", "a note"):
        assert words in told
    assert await page.ask("document.querySelector('#comparison').innerText.includes('aime')")
    assert await findings(page) == []
    assert page.requests() == [report.as_uri()]
    assert page.complaints() == []


async def test_a_report_of_hostile_samples(tmp_path: Path, page: Page) -> None:
    run = hostile_run(tmp_path / "bad")
    tokens = [
        ShownTokens(line=line, pieces=[text], log_probs=[-1.0], advantages=[0.0], trainer_log_probs=None)
        for line, text in enumerate(HOSTILE)
    ]
    write_tokens(run, 0, tokens)
    report = tmp_path / "report.html"
    report.write_text(html_report(run), encoding="utf-8")
    await page.open(report.as_uri())
    await page.until("document.querySelector('#state')?.innerText")
    for number in (0, 1):
        await page.go(f"#/run/bad/samples/0/{number}")
        await page.until(f"document.querySelector('#prompt-text')?.textContent.includes({json.dumps(HOSTILE[number])})")
    assert await page.ask("document.querySelectorAll('main script, main img').length") == 0
    assert page.requests() == [report.as_uri()]
    assert page.complaints() == []
