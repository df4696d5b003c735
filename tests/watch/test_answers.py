"""What the page of `make watch` is told: the numbers and samples of a run's directory, as it grows and after."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_run import write_run

from recipe.run.directory import SampleRecord
from recipe.run.journal import Journal, LineReader, encode
from recipe.run.sample_index import index_line
from recipe.run.shown_tokens import ShownTokens, write_tokens
from recipe.run.watch import samples as watch_samples
from recipe.run.watch.answers import Answers
from recipe.run.watch.samples import ROWS, Query, SampleFiles
from recipe.system.errors import UserError

STEPS, SAMPLES = 6, 32
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><b>",
    "\u202eright to left",
    "\ufffd\x00\x1b[31m",
    "x" * 1_000_000,
    "\n" * 9999,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "long"
    write_run(path, STEPS, SAMPLES, characters=100)
    return path


@pytest.fixture(scope="module")
def answers(run: Path) -> Answers:
    return Answers(run.parent)


@pytest.fixture(scope="module")
def records(run: Path) -> list[dict]:
    """Every sample as the files have it, with its step and line."""
    return [
        {**json.loads(line), "step": int(file.stem) + 1, "line": number}
        for file in sorted((run / "rollouts").glob("*.jsonl"))
        for number, line in enumerate(file.read_text().splitlines())
    ]


def hostile_run(path: Path) -> Path:
    """A run whose texts are those of HOSTILE."""
    write_run(path, 1, 8, characters=20)
    file = path / "rollouts" / "000000.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for number, record in enumerate(records):
        record |= dict.fromkeys(("prompt", "response", "label", "answer"), HOSTILE[number % len(HOSTILE)])
    file.write_bytes(b"".join(encode(record) for record in records))
    (path / "tokens" / "000000.jsonl").unlink()
    return path


def every_row(answers: Answers, query: dict[str, str]) -> list[dict]:
    """All pages of what a query finds."""
    rows: list[dict] = []
    while True:
        found = answers.samples("long", {**query, "offset": str(len(rows))})
        rows += found["rows"]
        if len(rows) >= found["matches"] or not found["rows"]:
            return rows


QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "text": st.sampled_from(["carry", "What is 3", "\\boxed{5}", "nowhere"]),
        "min_reward": st.sampled_from(["0", "0.5", "1"]),
        "max_reward": st.sampled_from(["0", "0.5"]),
        "min_length": st.integers(0, 5000).map(str),
        "max_length": st.integers(0, 9000).map(str),
        "finish": st.sampled_from(["stop", "length", "abort"]),
        "grade": st.sampled_from(["graded", "truncated"]),
        "from_step": st.integers(0, 7).map(str),
        "to_step": st.integers(0, 7).map(str),
        "group": st.integers(0, 30).map(str),
        "prompt": st.integers(0, 4).map(str),
        "sort": st.sampled_from(["newest", "reward", "length", "advantage"]),
        "descending": st.sampled_from(["0", "1"]),
    },
)


def wanted(record: dict, query: dict[str, str]) -> bool:
    """The filter, read plainly."""
    number = {name: float(query[name]) for name in query if name.startswith(("min_", "max_", "from_", "to_"))}
    return (
        (query.get("text", "") in record["prompt"] or query.get("text", "") in record["response"])
        and number.get("min_reward", -1) <= record["reward"] <= number.get("max_reward", 2)
        and number.get("min_length", 0) <= record["response_length"] <= number.get("max_length", 1e9)
        and number.get("from_step", 0) <= record["step"] <= number.get("to_step", 1e9)
        and query.get("finish", record["finish_reason"]) == record["finish_reason"]
        and query.get("grade", record["grade"]) == record["grade"]
        and int(query.get("group", record["group_index"])) == record["group_index"]
        and int(query.get("prompt", record["prompt_index"])) == record["prompt_index"]
    )


@settings(max_examples=60, deadline=None)
@given(query=QUERIES)
def test_a_query_finds_what_a_plain_filter_of_the_files_does(
    query: dict[str, str], answers: Answers, records: list[dict]
) -> None:
    expected = [record for record in records if wanted(record, query)]
    rows = every_row(answers, query)
    places = [(row["step"], row["line"]) for row in rows]
    assert sorted(places) == [(record["step"], record["line"]) for record in expected]
    key = {"reward": "reward", "length": "response_length", "advantage": "advantage"}.get(query.get("sort", ""))
    values = [row[key] for row in rows] if key else places
    assert values == sorted(values, reverse=query.get("descending", "1") == "1")


@pytest.mark.parametrize(("sort", "field"), [("reward", "reward"), ("length", "response_length")])
@pytest.mark.parametrize("descending", [True, False])
def test_rows_come_in_the_order_that_is_asked_for(
    sort: str, field: str, descending: bool, answers: Answers, records: list[dict]
) -> None:
    rows = every_row(answers, {"sort": sort, "descending": str(int(descending))})
    assert [row[field] for row in rows] == sorted((record[field] for record in records), reverse=descending)


@pytest.mark.parametrize("text", ["graded", "prompt_index", "finish_reason"])
def test_a_search_looks_at_prompt_and_response_alone(text: str, answers: Answers) -> None:
    """The files' lines have these words everywhere."""
    assert answers.samples("long", {"text": text})["matches"] == 0


def test_a_journal_that_was_cut_and_has_grown_beyond_what_was_read_is_read_anew(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path / "x"), LineReader(tmp_path / "x")
    for number in range(3):
        journal.append({"n": number})
    assert reader.new_lines() == ([{"n": 0}, {"n": 1}, {"n": 2}], True)
    journal.keep(lambda line: line["n"] == 0)
    for number in range(10, 15):
        journal.append({"n": number})
    lines, anew = reader.new_lines()
    assert anew
    assert [line["n"] for line in lines] == [0, 10, 11, 12, 13, 14]
    assert reader.new_lines() == ([], False)


def test_a_journal_is_read_in_pieces(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path / "x"), LineReader(tmp_path / "x")
    for number in range(50):
        journal.append({"n": number})
    found, pieces = [], 0
    while lines := reader.new_lines(limit=100)[0]:
        found += lines
        pieces += 1
    assert [line["n"] for line in found] == list(range(50))
    assert pieces > 4


def test_a_search_that_runs_out_of_time_goes_on_where_it_was(
    answers: Answers, records: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time at all: the newest step alone is looked at, then the one before it, to the first."""
    monkeypatch.setattr(watch_samples, "SEARCH_S", -1.0)
    found: list[tuple[int, int]] = []
    query, searched = {"text": "What is"}, []
    for _ in range(STEPS):
        answer = answers.samples("long", query)
        found += [(row["step"], row["line"]) for row in answer["rows"]]
        searched.append(answer["searched_from_step"])
        query["before_step"] = str(answer["searched_from_step"])
    assert searched == list(range(STEPS, 0, -1))
    assert answer["complete"]
    assert sorted(found) == [(record["step"], record["line"]) for record in records]


def test_an_opened_sample_is_the_files_with_its_group(answers: Answers, records: list[dict]) -> None:
    for record in records[:: SAMPLES // 2 + 1]:
        sample = answers.sample("long", record["step"] - 1, record["line"])
        for name in ("prompt", "response", "label", "reward", "advantage", "answer", "weight_versions"):
            assert sample[name] == record[name]
        group = [one["line"] for one in records if one["group_index"] == record["group_index"]]
        assert [row["line"] for row in sample["group_rows"]] == group
        assert record["label"] in sample["grade_text"]


def test_tokens_are_those_that_were_kept(answers: Answers, run: Path, tmp_path: Path) -> None:
    sample = answers.sample("long", STEPS - 1, 2)
    kept = [json.loads(line) for line in (run / "tokens" / f"{STEPS - 1:06}.jsonl").read_text().splitlines()]
    assert sample["tokens"] == kept[2]
    other = answers.sample("long", 0, 2)
    assert other["tokens"] is None
    assert "--keep-token-groups" in other["tokens_missing"]
    tokens = ShownTokens(line=0, pieces=["a"], log_probs=[-1.0], advantages=[0.0], trainer_log_probs=None)
    write_run(tmp_path / "x", 1, 8)
    write_tokens(tmp_path / "x", 0, [tokens])
    found = Answers(tmp_path).sample("x", 0, 0)
    assert found["tokens"]["log_probs"] == [-1.0]
    assert found["differences_missing"]


def test_columns_are_the_lines_of_the_metrics(answers: Answers, run: Path) -> None:
    lines = Journal(run / "metrics.jsonl").read()
    table = answers.metrics("long", None, None)
    assert table["steps"] == [line["step"] for line in lines]
    for name in {name for line in lines for name in line} - {"step"}:
        column = table["columns"][name.replace("_ci95_low", ":low").replace("_ci95_high", ":high")]
        for value, line in zip(column, lines, strict=True):
            assert value == (None if name not in line else pytest.approx(line[name], rel=1e-5)), name
    assert all(len(column) == len(lines) for column in table["columns"].values())
    assert set(table["metrics"]) == {name for name in table["columns"] if ":" not in name}
    assert all(entry["sentence"] for entry in table["metrics"].values())


def test_a_run_that_grows_is_told_bit_by_bit_as_at_once(run: Path, tmp_path: Path) -> None:
    growing = tmp_path / "long"
    (growing / "rollouts").mkdir(parents=True)
    (growing / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    names = ("conditions.jsonl", "metrics.jsonl", "samples.jsonl")
    whole = {name: (run / name).read_bytes() for name in names}
    answers, steps, columns, generation = Answers(tmp_path), [], {}, None
    for end in range(0, 101, 5):
        for name in names:  # cut anywhere, in the middle of a line too
            (growing / name).open("ab").write(
                whole[name][len(whole[name]) * (end - 5) // 100 if end else 0 : len(whole[name]) * end // 100]
            )
        found = answers.metrics("long", steps[-1] if steps else None, generation)
        generation = found["generation"]
        for name in found["columns"].keys() - columns.keys():
            columns[name] = [None] * len(steps)
        steps += found["steps"]
        for name, column in columns.items():
            column += found["columns"].get(name, [None] * len(found["steps"]))
        answers.prepare_samples("long")
    at_once = Answers(run.parent).metrics("long", None, None)
    assert steps == at_once["steps"]
    assert {name: column for name, column in columns.items() if name != "gpu_idle_share"} == {
        name: column for name, column in at_once["columns"].items() if name != "gpu_idle_share"
    }
    assert answers.samples("long", {})["matches"] == STEPS * SAMPLES


def test_a_run_that_was_cut_back_is_told_anew(tmp_path: Path) -> None:
    run = tmp_path / "long"
    write_run(run, STEPS, SAMPLES)
    answers = Answers(tmp_path)
    before = answers.metrics("long", None, None)
    answers.prepare_samples("long")
    Journal(run / "metrics.jsonl").keep(lambda line: line["step"] <= 2)
    Journal(run / "samples.jsonl").keep(lambda line: line["rollout_id"] < 2)
    after = answers.metrics("long", STEPS, before["generation"])
    assert after["generation"] != before["generation"]
    assert after["steps"] == [0, 1, 2]
    assert answers.samples("long", {})["matches"] == 2 * SAMPLES


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    answers = Answers(hostile_run(tmp_path / "bad"))
    rows = answers.samples("bad", {})["rows"]
    assert {row["prompt"] for row in rows} == {text[: watch_samples.BEGINNING] for text in HOSTILE}
    for number in range(8):
        sample, text = answers.sample("bad", 0, number), HOSTILE[number % len(HOSTILE)]
        assert sample["response"] + "x" * sample["response_left_out"] + sample["response_end"] == text
    found = answers.samples("bad", {"text": "<script>"})
    assert {row["prompt"] for row in found["rows"]} == {HOSTILE[0]}


def test_a_damaged_or_missing_sample_is_a_sentence(tmp_path: Path) -> None:
    run = tmp_path / "long"
    write_run(run, 2, 8)
    (run / "rollouts" / "000001.jsonl").write_text('{"cut off')
    answers = Answers(tmp_path)
    assert answers.samples("long", {})["matches"] == 16
    for rollout, line in ((1, 0), (0, 99), (7, 0)):
        with pytest.raises(UserError, match="has no sample"):
            answers.sample("long", rollout, line)


def test_a_page_of_many_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "long", 1, 2 * ROWS + 8)
    answers = Answers(tmp_path)
    assert [len(answers.samples("long", {"offset": str(start)})["rows"]) for start in (0, ROWS, 2 * ROWS)] == [
        ROWS,
        ROWS,
        8,
    ]


@pytest.mark.parametrize("query", [{"min_reward": "much"}, {"sort": "beauty"}, {"offset": "-1"}])
def test_a_filter_that_says_nothing_is_a_sentence(answers: Answers, query: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"the filter {next(iter(query))}="):
        answers.samples("long", query)


def test_an_index_line_that_knows_other_words(tmp_path: Path) -> None:
    """Names of reasons are numbered anew in each line."""

    def record(reason: str) -> SampleRecord:
        fields = dict.fromkeys(SampleRecord.__dataclass_fields__, 0)
        return SampleRecord(**{**fields, "finish_reason": reason, "grade": "graded", "weight_versions": []})  # type: ignore[arg-type]

    (tmp_path / "rollouts").mkdir()
    journal = Journal(tmp_path / "samples.jsonl")
    for rollout, reasons in enumerate([["stop", "length"], ["abort", "stop"], ["length"]]):
        journal.append(index_line(rollout, [record(reason) for reason in reasons]))
    from recipe.run.sample_index import SampleIndex

    index = SampleIndex(tmp_path)
    index.refresh()
    files = SampleFiles(tmp_path, index)
    found = {reason: files.find(Query(finish=reason))["matches"] for reason in ("stop", "length", "abort", "none")}
    assert found == {"stop": 2, "length": 2, "abort": 1, "none": 0}
