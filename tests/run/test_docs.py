"""README, CONTRIBUTING and docs/: current where they are generated, and true where they name something."""

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_arrows import FLOORS

from recipe.config.flags import FLAGS, RECIPE_FLAG, SGLANG_PREFIX
from recipe.config.usage import CHECK, FORCE, HELP, REPLAY_STEP

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_FLAGS = {
    "--dist-init-addr", "--nnodes", "--tp-size",  # SGLang's, without our prefix
    "--gpus", "--ipc", "--shm-size", "--time", "--ulimit",  # Docker's, --gpus also of scripts
    "--nproc-per-node",  # torchrun's
    "--runtime",  # nvidia-ctk's
}  # fmt: skip


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    return load(ROOT / "scripts" / "make_docs.py")


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Of training, of every command and script, and of others' programs."""
    programs = [path for folder in ("recipe", "evaluation", "scripts") for path in (ROOT / folder).rglob("*.py")]
    parsed = {flag for path in programs for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text())}
    tasks = {flag for flags in task_flags().values() for flag in flags}
    return {*FLAGS, RECIPE_FLAG, CHECK, FORCE, REPLAY_STEP, *HELP} | parsed | tasks | OTHERS_FLAGS


def task_flags() -> dict[str, set[str]]:
    """The flags of every invoke task."""
    from invoke import Collection

    collection = Collection.from_module(load(ROOT / "tasks.py"))
    return {
        name: {f"--{word}" for argument in collection[name].get_arguments() for word in spelled(argument)}
        for name in collection.task_names
    }


def spelled(argument) -> Iterator[str]:
    for name in argument.names:
        yield name.replace("_", "-")
        yield f"no-{name.replace('_', '-')}"


def code_of(page: Path) -> Iterator[str]:
    """Code spans, and lines of code blocks that are for a shell."""
    text = page.read_text()
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        if not language:
            yield from block.splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def named(pattern: str) -> Iterator[tuple[str, str]]:
    """Where the pages' code has it, and what its group is."""
    for page in PAGES:
        for code in code_of(page):
            for found in re.findall(pattern, code.partition(" #")[0]):
                yield page.name, found


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_parts_are_current(make_docs: ModuleType) -> None:
    stale = [path.name for path, text in make_docs.generated().items() if not path.exists() or path.read_text() != text]
    assert stale == [], f"{', '.join(stale)}: run `make docs` and commit what it writes"


def test_a_changed_default_makes_a_page_stale(make_docs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_docs.configuration()
    field = make_docs.GROUPS["optimizer"].model_fields["clip_grad"]
    monkeypatch.setattr(field, "default", 7.0)
    after = make_docs.configuration()
    assert after != before
    assert after == before.replace("| `--clip-grad` | `1.0` |", "| `--clip-grad` | `7.0` |")


def test_every_flag_has_a_row() -> None:
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    assert [flag for flag in FLAGS if f"`{flag}`" not in configuration] == []


def test_links_and_anchors_resolve() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in slugs(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} == linked


def test_make_targets_exist() -> None:
    [declared] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = set(declared.split())
    shown = set(named(r"(?:^|(?<=\s))make ([a-z][a-z0-9-]*)"))
    assert {"train-tiny", "test", "smoke", "docs"} <= {target for _, target in shown}
    assert sorted(one for one in shown if one[1] not in targets) == []


def test_invoke_tasks_and_their_flags_exist() -> None:
    tasks = task_flags()
    shown = list(named(r"\binvoke ([a-z].*)"))
    assert shown
    for page, command in shown:
        task, *words = shlex.split(command)
        assert task in tasks, f"{page}: invoke {task}"
        unknown = [word for word in words if word.startswith("--") and word not in tasks[task]]
        assert unknown == [], f"{page}: invoke {command}"


def test_modules_that_are_run_exist() -> None:
    """Those of ours; a package needs a __main__."""
    shown = {module for _, module in named(r"-m ((?:recipe|evaluation)[\w.]*)")}
    assert {"recipe.train", "evaluation.aime"} <= shown
    for module in shown:
        path = ROOT / module.replace(".", "/")
        runnable = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert runnable.exists(), module
        assert "__main__" in runnable.name or '__name__ == "__main__"' in runnable.read_text(), module


def test_files_and_folders_that_are_named_exist() -> None:
    shown = set(named(r"(?<![\w/.$-])((?:recipe|evaluation|scripts|tests|requirements|\.ci)/[\w./-]*\w)"))
    assert len(shown) > 30
    example = ("recipe/rewards/my_rewards.py",)
    assert sorted(one for one in shown if one[1] not in example and not (ROOT / one[1]).exists()) == []


def test_flags_exist(known_flags: set[str]) -> None:
    shown = {
        (page.name, flag) for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?!-)\b", page.read_text())
    }
    assert len(shown) > 200
    assert sorted(one for one in shown if one[1] not in known_flags and not is_sglangs(one[1])) == []


def is_sglangs(flag: str) -> bool:
    """Flags of this form are SGLang's, whose parser is asked in tests/config/test_sglang_parser.py."""
    return flag.startswith(SGLANG_PREFIX)


def test_the_readme_is_short_and_begins_with_what_is_proven() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert next(line for line in lines if line.startswith("## ")).startswith("## Status")


def test_the_readmes_reward_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from recipe.rewards import CustomReward, Grader, GradeRequest

    readme = (ROOT / "README.md").read_text()
    [function] = re.findall(r"^ *```python\n(.*?)^ *```", readme, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_rewards.py").write_text(re.sub(r"^  ", "", function, flags=re.MULTILINE))
    monkeypatch.syspath_prepend(str(tmp_path))
    [path] = re.findall(r"train-tiny ARGS=\"--custom-rm-path (\S+)\"", readme)
    with Grader(CustomReward(path)) as grader:
        right, wrong = grader.grade([GradeRequest("1 + 1 =", answer, "2") for answer in "23"])
    assert right.reward == pytest.approx(0.999)
    assert wrong.reward < 0


def test_the_picture_of_the_rooms_is_the_tests() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    [picture] = re.findall(r"```text\n(recipe\.smoke.*?)```", text, re.DOTALL)
    floors = [set(line.partition("|")[0].replace(",", " ").split()) for line in picture.splitlines()]
    assert floors == [set(floor) for floor in reversed(FLOORS)]


def test_sentences_of_troubleshooting_are_the_codes() -> None:
    """Quoted headings and what a list quotes; `...` stands for what differs."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r'^(?:### |- )"(.*?)"(?:$|:)', re.sub(r"\n  ", " ", text), re.MULTILINE)
    assert len(quoted) > 40
    assert len(re.findall("^### ", text, re.MULTILINE)) >= 60
    said = list(texts_of_the_code())
    pieces = {sentence: map(re.escape, map(str.strip, sentence.split("..."))) for sentence in quoted}
    patterns = {sentence: re.compile(".*".join(parts)) for sentence, parts in pieces.items()}
    assert [sentence for sentence, pattern in patterns.items() if not any(map(pattern.search, said))] == []


def texts_of_the_code() -> Iterator[str]:
    """Every text in the programs on one line, what is filled in as a space, and the lines of the installing script."""
    for folder in ("recipe", "evaluation"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    yield from (ROOT / "scripts" / "install.sh").read_text().splitlines()
