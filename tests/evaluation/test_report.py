"""report.html in a real browser."""

import json
import os
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, open_browser

from evaluation.grading import Judgement, Verdict
from evaluation.report import SHOWN_CHARACTERS, render_report
from evaluation.result import Result, SamplingSettings, Settings
from evaluation.sampling import Plan, SampleKey, SampleStore, StoredSample
from evaluation.scoring import result_of
from recipe.data.prompts import Prompt
from recipe.rollout.generate import SeedStream
from recipe.sampling.sample import FinishReason
from recipe.sampling.sampling_params import SamplingParams

HOSTILE = "<script>document.title = 'taken over'</script><img src='http://example.invalid/x.png'>&amp;</pre>\u202e"
N_SAMPLES, LONGEST = 16, 16_384
VERDICTS = [Verdict.CORRECT] * 8 + [Verdict.WRONG] * 3 + [Verdict.TRUNCATED] * 3 + [Verdict.NO_ANSWER]


def made_up(folder: Path) -> tuple[Result, dict[SampleKey, StoredSample]]:
    """30 problems x 16 samples of every verdict and many lengths, some hostile, one very long."""
    problems = [Prompt(n, (), f"<|user|>Problem {n}: {HOSTILE}", (1,), f"{n:03}", name=f"{n}") for n in range(30)]
    plan = Plan(problems, N_SAMPLES, SamplingParams(LONGEST), SeedStream(1, ("eval", "x")))
    store = SampleStore(folder / "samples.jsonl", N_SAMPLES)
    judgements = {}
    for place, number in list(plan.missing(store)):
        verdict = Verdict.GRADER_FAILED if (place, number) == (7, 15) else VERDICTS[(place * number) % len(VERDICTS)]
        cut = verdict is Verdict.TRUNCATED
        text = (
            f"thoughts of {place}/{number} {HOSTILE}" + "long " * (60_000 if (place, number) == (0, 0) else 3) + "end"
        )
        sample = StoredSample(
            f"{place}",
            number,
            plan.seeds.sample_seed(place, number),
            text,
            FinishReason.LENGTH if cut else FinishReason.STOP,
            LONGEST if cut else 200 + (place * 977 + number * 331) % 9000,
            "1",
        )
        store.samples[sample.key] = sample
        answered = verdict in (Verdict.CORRECT, Verdict.WRONG)
        answer = f"{place + (verdict is Verdict.WRONG)}{HOSTILE * (number == 3)}" if answered else None
        judgements[sample.key] = Judgement(verdict, answer, f"because {HOSTILE}")
    settings = Settings(
        model=f"models/{HOSTILE}",
        model_sha256="0" * 64,
        engine="server",
        engine_args=(),
        data="aime-2024.jsonl",
        data_sha256="1" * 64,
        instruction="Box it.",
        prompts_sha256="2" * 64,
        profile=None,
        context_length=202_752,
        sampling=SamplingSettings(
            n_samples=N_SAMPLES, max_response_len=LONGEST, temperature=1, top_p=1, top_k=-1, seed=1
        ),
    )
    return result_of(settings, plan, store, judgements), store.samples


async def check_page(page: Page, result: Result) -> None:
    """What a reader sees."""
    samples = result.score.samples
    assert await page.ask("document.title") == f"aime-2024.jsonl: avg@16 {100 * result.score.avg_at_n.mean:.1f}%"
    assert await page.ask("document.querySelector('#score').innerText") == f"{100 * result.score.avg_at_n.mean:.1f}%"
    assert "not comparable" in await page.ask("document.querySelector('.note').innerText")
    assert await page.ask("document.querySelectorAll('script, img, link, iframe').length") == 0
    assert await page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    order = json.loads(
        await page.ask("JSON.stringify([...document.querySelectorAll('.sample')].map(e => e.dataset.verdict))")
    )
    assert len(order) == samples
    first = [Verdict.WRONG, Verdict.TRUNCATED, Verdict.NO_ANSWER, Verdict.GRADER_FAILED, Verdict.CORRECT]
    assert order == sorted(order, key=first.index)
    assert {verdict: order.count(verdict) for verdict in Verdict} == result.score.verdicts
    for plot, count in (("by-problem", samples), ("lengths", samples)):
        drawn = await page.ask(
            f"[...document.querySelectorAll('#{plot} rect title')].map(t => +t.textContent.match(/: (\\d+) /)[1])"
            ".reduce((a, b) => a + b)"
        )
        assert drawn == count
        assert await page.ask(f"document.querySelector('#{plot}').getBoundingClientRect().height") > 150
    visible = "[...document.querySelectorAll('svg rect')].every(r => getComputedStyle(r).fill !== 'rgb(0, 0, 0)')"
    assert await page.ask(visible)


async def check_samples(page: Page, samples: dict[SampleKey, StoredSample]) -> None:
    """Every response can be opened and read."""
    hidden = await page.ask("document.querySelector('.sample pre').checkVisibility()")
    assert not hidden
    await page.ask("document.querySelectorAll('.sample > summary').forEach(summary => summary.click())")
    shown = "[...document.querySelectorAll('.sample')].every(e => e.querySelector('pre').checkVisibility())"
    assert await page.ask(shown)
    for place, number in ((3, 1), (29, 15)):
        text = await page.ask(f"document.getElementById('p{place}-s{number}').querySelector('pre').textContent")
        assert text == samples[f"{place}", number].response
    long = samples["0", 0].response
    parts = "[...document.getElementById('p0-s0').querySelectorAll('pre')].map(e => e.textContent).join('|')"
    half = SHOWN_CHARACTERS // 2
    assert await page.ask(parts) == f"{long[:half]}|{long[-half:]}"
    note = await page.ask("document.querySelector('#p0-s0 .note').innerText")
    assert note == f"{len(long) - 2 * half:,} characters are left out here; samples.jsonl has them."


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("REQUIRE_CHROMIUM"),
    reason="no Chromium on this machine (Debian: apt-get install chromium)",
)
async def test_in_a_browser(tmp_path: Path) -> None:
    assert CHROMIUM is not None, "REQUIRE_CHROMIUM is set, but there is no Chromium"
    result, samples = made_up(tmp_path)
    report = tmp_path / "report.html"
    report.write_text(render_report(result, samples), encoding="utf-8")
    async with open_browser(tmp_path / "profile") as page:
        await page.open(report.as_uri())
        assert len(await page.screenshot()) > 20_000
        await check_page(page, result)
        await check_samples(page, samples)
        assert page.requests() == [report.as_uri()]
        assert page.complaints() == []


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    page = render_report(*made_up(tmp_path))
    assert "<script" not in page
    assert HOSTILE not in page
    assert "src=&#39;http://example.invalid" in page
