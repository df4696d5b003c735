"""Tuning by the plan, and the recipes that it led to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config import sglang_rules
from recipe.config.flags import SGLANG_KEY, parse_command_line
from recipe.config.loading import read_settings
from recipe.plan.hardware import Machine
from recipe.plan.node import machine_as_measured, read_rates
from recipe.plan.options import PUBLISHED, read_without_weights
from recipe.plan.time_plan import Work
from recipe.plan.tune.recipe_file import check_target, write_recipe
from recipe.plan.tune.search import Choice, Tuner
from recipe.plan.tune.space import engines, trainers
from recipe.plan.tune.table import hint, table
from recipe.system.errors import UserError

FAST = ("8gpu", "16gpu", "24gpu")


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether SGLang is installed or not."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


def tuner_of(recipe: str, *flags: str) -> Tuner:
    settings, resolved = read_without_weights(["--recipe", recipe, "--hf-checkpoint", str(PUBLISHED), *flags])
    machine = Machine.described("H100-80GB", 8, "1TB", "2TB", 2.5)
    return Tuner(settings, resolved.architecture, machine, None)


@pytest.mark.parametrize("recipe", FAST)
def test_a_fast_recipe_turns_only_what_is_not_learned_from(recipe: str) -> None:
    names = (f"glm4.7-flash-{recipe}", f"glm4.7-flash-{recipe}-fast")
    slow, fast = (read_settings(parse_command_line(["--recipe", name])) for name in names)
    changed = {key for key in fast if key not in slow or fast[key].value != slow[key].value}
    tuner = tuner_of(names[0])
    given = tuner.given().plan.resolved
    tried = (*engines(given.config, tuner.architecture), *trainers(given.config, tuner.architecture))
    may_be = {key for values in tried for key in values}
    assert changed - {"misc.name"} <= may_be
    assert "misc.name" in changed


@pytest.mark.parametrize("recipe", FAST)
def test_a_fast_recipe_fits_and_costs_a_third_less(recipe: str) -> None:
    slow, fast = (tuner_of(f"glm4.7-flash-{recipe}{end}").given() for end in ("", "-fast"))
    assert fast.plan.fits
    assert fast.dollars < 0.67 * slow.dollars


def test_a_fast_recipe_has_nothing_left_on_the_table_and_the_given_one_does() -> None:
    slow, fast = tuner_of("glm4.7-flash-8gpu"), tuner_of("glm4.7-flash-8gpu-fast")
    [line] = hint(slow.given(), slow.quick())
    assert "--sglang-max-running-requests 512 --sglang-cuda-graph-max-bs-decode 64 --async-save" in line
    assert list(hint(fast.given(), fast.quick())) == []
    nearly = tuner_of("glm4.7-flash-8gpu-fast", "--no-async-save")
    assert nearly.quick() is not None
    assert list(hint(nearly.given(), nearly.quick())) == []


def test_what_a_rule_refuses_or_does_not_fit_is_never_chosen() -> None:
    tuner = tuner_of("glm4.7-flash-8gpu")
    assert tuner.choice({"perf.tensor_model_parallel_size": 3}) is None
    large = tuner.choice({f"{SGLANG_KEY}.mem_fraction_static": 0.95})
    assert large is not None
    assert not large.plan.fits
    assert list(tuner._that_fit([large.values])) == []
    full_disk = tuner_of("glm4.7-flash-8gpu", "--save-keep", "100")
    assert list(full_disk._that_fit([{}])) == []


def test_a_run_without_gpus_is_refused() -> None:
    settings, resolved = read_without_weights(["--recipe", "tiny", "--hf-checkpoint", str(PUBLISHED)])
    tuner = Tuner(settings, resolved.architecture, Machine.described("H100", 8, "1TB", None, 2.5), None)
    with pytest.raises(UserError, match="see what make plan says"):
        tuner.given()


@pytest.mark.slow
def test_a_written_recipe_is_what_was_planned(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    command = [sys.executable, "-m", "recipe.plan.tune", "--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint"]
    ended = subprocess.run(
        [*command, str(PUBLISHED), "--best", "2", "--write", str(target)], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    assert "By the plan 1 costs " in ended.stdout
    assert f"train with --recipe {target}" in ended.stdout
    written = tuner_of(str(target)).given()
    assert written.plan.fits
    assert written.dollars < 0.5 * tuner_of("glm4.7-flash-8gpu").given().dollars
    assert written.plan.resolved.config.misc.name == "mine"


@pytest.mark.slow
def test_where_nothing_fits_nothing_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipe.plan.tune", "--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint"]
    flags = ["--gpu", "A100-40GB", "--host-memory", "200GB", "--write", str(tmp_path / "mine.toml")]
    ended = subprocess.run([*command, str(PUBLISHED), *flags], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 2
    assert ended.stdout.splitlines()[-1].startswith("Nothing that was tried fits")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_settings_go_through_a_recipe_unchanged(tmp_path: Path) -> None:
    """Numbers, words, switches, and arguments of SGLang's that are left out."""
    tuner = tuner_of("glm4.7-flash-24gpu")
    values = {
        "sglang.rollout_num_gpus_per_engine": 8,
        f"{SGLANG_KEY}.ep_size": 8,
        f"{SGLANG_KEY}.dp_size": 8,
        f"{SGLANG_KEY}.ep_num_redundant_experts": False,
        f"{SGLANG_KEY}.mem_fraction_static": 0.6,
        "perf.recompute_method": "block",
        "perf.recompute_num_layers": 4,
        "checkpoint.async_save": True,
    }
    choice = tuner.choice(values)
    assert choice is not None
    write_recipe(tmp_path / "mine.toml", "glm4.7-flash-24gpu", choice, tuner.machine)
    again = tuner_of(str(tmp_path / "mine.toml")).given().plan.resolved.config
    expected = choice.plan.resolved.config
    assert again.model_copy(update={"misc": expected.misc}) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mine.txt", "ends in .toml"), ("there.toml", "is there already"), ("no/mine.toml", "no folder")],
)
def test_a_place_where_no_recipe_can_be_written_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "there.toml").write_text("mine")
    with pytest.raises(UserError, match=reason):
        check_target(tmp_path / name)
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_a_slower_node_is_planned_slower(tmp_path: Path) -> None:
    """By the rates that a smoke run wrote there; a file that is none is a sentence."""
    machine = tuner_of("glm4.7-flash-8gpu").machine
    (tmp_path / "rates.json").write_text(json.dumps({"host_memory": 100e9, "matmul": 300e12, "gpu_memory": 1.5e12}))
    here = machine_as_measured(machine, read_rates(tmp_path / "rates.json"))
    assert here.gpu.link_bandwidth == machine.gpu.link_bandwidth
    settings, resolved = read_without_weights(["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED)])
    usual, slow = (Tuner(settings, resolved.architecture, one, None).given().plan.time for one in (machine, here))
    assert usual is not None
    assert slow is not None
    for work in (Work.ROLLOUT, Work.TRAIN, Work.OPTIMIZER):
        assert slow.seconds[work].best > 1.2 * usual.seconds[work].best
    optimizer = slow.seconds[Work.OPTIMIZER]
    assert optimizer.best == pytest.approx(optimizer.worst, rel=0.01), "measured, but for the weights' gathering"
    for text in ('{"host_memory": "fast"}', '{"matmul": 3e14}', "[]", "no"):
        (tmp_path / "rates.json").write_text(text)
        with pytest.raises(UserError, match=r"rates\.json .*: name the rates\.json of a smoke run"):
            read_rates(tmp_path / "rates.json")


def test_the_table_has_a_column_for_each_and_ends_with_a_sentence() -> None:
    tuner = tuner_of("glm4.7-flash-8gpu")
    given, best = tuner.given(), tuner.quick()
    assert isinstance(best, Choice)
    lines = table(given, [best]).splitlines()
    assert lines[0].split() == ["given", "1"]
    assert lines[-1].startswith("By the plan 1 costs 4")
    assert table(given, []).splitlines()[-1].startswith("Nothing that was tried fits")
    assert table(given, [given]).splitlines()[-1].startswith("Nothing that was tried is cheaper")
