"""report.html: the page of a run in one file, which needs no server and no network."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recipe.run.shown_tokens import FOLDER, read_all_tokens
from recipe.run.watch.answers import Answers
from recipe.run.watch.server import STATIC
from recipe.system.errors import UserError

FILE = "report.html"
STEPS_WITH_SAMPLES = 3
"""Newest steps of which the report has the samples whose tokens were kept."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"( defer)?></script>')


def html_report(run: Path, other: Path | None = None, comparison: Mapping[str, Any] | None = None) -> str:
    """The report of a run, with another's curves beside its own if one is given, and what `comparison` says of the two.
    Raises UserError if a run is not there, or both have one name."""
    if other is not None and other.resolve().name == run.resolve().name:
        raise UserError(
            f"{run} and {other} have one name, by which a report tells them apart: rename one of the folders"
        )
    embedded = _answers(run)
    embedded[f"api/run/{run.resolve().name}/head"]["comparison"] = comparison
    if other is not None:
        of_other = _answers(other)
        listed = embedded["api/runs"]["runs"] + of_other.pop("api/runs")["runs"]
        embedded = of_other | embedded | {"api/runs": {**embedded["api/runs"], "runs": listed}}
    return _inlined(json.dumps(embedded, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c"))


def _answers(run: Path) -> dict[str, Any]:
    """What the page asks of a run, by the path that it asks by."""
    answers, name = Answers(run), run.resolve().name
    at = f"api/run/{name}"
    found = {
        "api/runs": answers.runs(),
        f"{at}/head": answers.head(name),
        f"{at}/metrics": answers.metrics(name, None, None),
        f"{at}/timeline": answers.course(name, None),
    }
    samples = {}
    for rollout, line in _with_tokens(run):
        with suppress(UserError):  # its rollout's file may be gone
            samples[f"{at}/sample?rollout={rollout}&line={line}"] = answers.sample(name, rollout, line)
    rows = [row for sample in samples.values() for row in sample["group_rows"] if _is(row, sample)]
    listed = answers.samples(name, {"from_step": "1"})
    return found | samples | {f"{at}/samples": {**listed, "matches": len(rows), "rows": rows}}


def _is(row: Mapping[str, Any], sample: Mapping[str, Any]) -> bool:
    return (row["rollout"], row["line"]) == (sample["rollout"], sample["line"])


def _with_tokens(run: Path) -> Iterator[tuple[int, int]]:
    """Rollout and line of the samples that the report has, the newest steps first."""
    for path in sorted((run / FOLDER).glob("*.jsonl"), reverse=True)[:STEPS_WITH_SAMPLES]:
        rollout = int(path.stem)
        yield from ((rollout, tokens.line) for tokens in read_all_tokens(run, rollout))


def _inlined(embedded: str) -> str:
    """The page with its styles and scripts in it, and the answers that it would ask for."""

    def put(tag: str) -> Callable[[re.Match[str]], str]:
        return lambda found: f"<{tag}>\n{(STATIC / found[1]).read_text(encoding='utf-8')}\n</{tag}>"

    page = (STATIC / "index.html").read_text(encoding="utf-8")
    page = _SCRIPT.sub(put("script"), _STYLE.sub(put("style"), page))
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    data = f'<script type="application/json" id="embedded">{embedded}</script>'
    return page.replace("</title>", f"</title>\n{head}", 1).replace("<body>", f"<body>\n{data}", 1)
