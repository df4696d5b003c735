"""The scripts that measure and compare the trainer, in their small form on a CPU."""

import importlib
import re
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked_commands import forked, run_script

from recipe.config import resolve
from recipe.plan.constants import DRAFT_ACCEPTANCE
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.ranges import Between, Pace

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def check_layouts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import check_layouts

    return check_layouts


@pytest.fixture
def run_with_ranks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """Runs a script whose ranks are forked from the process that the trainer's tests fork theirs from. What it
    printed."""
    forkserver.ensure_running()
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str, flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        importlib.import_module(name).main()
        return capfd.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "figures"),
    [
        ("bench_adam.py --device cpu --millions 1 --threads 1", [r"AdamW: [\d.]+ s a billion parameters"]),
        ("bench_convert.py --tiny --rounds 1 --processes 1", [r"cp .*\n", r"convert .*\n", r"export .*\n"]),
        ("bench_grading.py --rounds 1 --characters 1000", [r"480 responses.*'correct': \d+"]),
        ("bench_watch.py --steps 20 --samples 16", [r"curves +[\d.]+ s", r"read plainly +[\d.]+ s"]),
        ("simulate_packing.py --samples-per-rank 2", [r"1024 balanced"]),
    ],
)
def test_a_benchmark_has_its_figures(command: str, figures: list[str]) -> None:
    name, *words = command.split()
    status, output = forked(run_script, SCRIPTS / name, words)
    assert status == 0, output
    for figure in figures:
        assert re.search(figure, output), output


@pytest.mark.slow
def test_a_save_is_measured_beside_plain_writes(run_with_ranks: Callable[[str, str], str], tmp_path: Path) -> None:
    output = run_with_ranks("bench_save", f"{tmp_path} --device cpu --tiny")
    for what in ("written", "read", "plain"):
        assert re.search(f"{what} .*GB/s", output), output


@pytest.mark.slow
def test_layouts_are_compared(check_layouts: ModuleType, run_with_ranks: Callable[[str, str], str]) -> None:
    """Where gradients are sharded over ranks (DP2) and over stages (PP2), and with the yardstick of other kernels."""
    output = run_with_ranks("check_layouts", "--device cpu --layouts DP2 PP2-uneven --precisions bf16")
    verdicts = [line.split()[:2] for line in output.splitlines() if line.startswith(("ok", "FAIL"))]
    assert verdicts == [["ok", "one"]] * len(check_layouts.OTHERS) + [["ok", "DP2"], ["ok", "PP2-uneven"]]


@pytest.mark.parametrize(
    ("gradient", "losses", "norms", "holds"),
    [(1e-5, 0.0, 1e-5, True), (2e-4, 0.0, 0.0, False), (0.0, 2e-4, 0.0, False), (0.0, 0.0, 2e-4, False)],
)
def test_one_figure_that_is_apart_fails_a_layout(
    check_layouts: ModuleType, gradient: float, losses: float, norms: float, holds: bool
) -> None:
    found = check_layouts.Difference({"one": 0.0, "another": gradient}, losses, norms)
    unit = check_layouts.Difference.everywhere(1.0, found)
    told, verdict = check_layouts.row("EP2", found, unit, check_layouts.EXACT, 1.0)
    assert verdict is holds
    assert told.startswith("ok" if holds else "FAIL")


@pytest.mark.slow
def test_several_ranks_are_measured_beside_one(run_with_ranks: Callable[[str, str], str]) -> None:
    output = run_with_ranks("bench_trainer", "--device cpu --gpus 2 --tokens 64 --sequences 2 --packs 1 --moe-layers 1")
    assert re.search(
        r"^each of 2 GPUs keeps [\d.]+% of one's tokens/s in forward and backward, [\d.]+% in whole steps$",
        output,
        re.MULTILINE,
    )


def test_what_drafts_learn_from_and_how_they_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft target is what samples teach in expectation, and they where the policy has no choice."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_mtp_target import ACCEPTED, LOSSES

    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(6, 5, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in "pq")
    each = [LOSSES["sampled"](log_p, log_q, torch.full((6,), token)) for token in range(5)]
    torch.testing.assert_close(LOSSES["soft"](log_p, log_q, each[0]), (log_p.exp() * torch.stack(each, 1)).sum(-1))
    certain = torch.full((6, 5), -torch.inf, dtype=torch.float64).index_fill(1, torch.tensor([3]), 0.0)
    torch.testing.assert_close(LOSSES["soft"](certain, log_q, each[0]), each[3])
    for accepted in ACCEPTED.values():
        torch.testing.assert_close(accepted(certain, certain), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(ACCEPTED["likeliest"](log_p, log_p), log_p.exp().amax(-1))
    rejected = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    torch.testing.assert_close(1 - ACCEPTED["drawn"](log_p, log_q), rejected)
    torch.testing.assert_close(LOSSES["variation"](log_p, log_q, each[0]), rejected)


def test_time_on_gpus_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 comes 2 ms later to the exchange of rows, which takes 3; rank 0 computes meanwhile for 1 of its 5."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from timeline import Kernel, Timeline, told

    rows = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    early = [Kernel("gemm", 0, 2000), Kernel(rows, 2000, 7000), Kernel("gemm", 3000, 4000), Kernel("gemm", 8000, 9000)]
    late = [Kernel("gemm", 0, 4000), Kernel(rows, 4000, 7000), Kernel("gemm", 7000, 9000)]
    assert told([Timeline.of(early), Timeline.of(late)]) == [
        "rank 0: 9.0 ms: 4.0 computing, 4.0 with nothing but exchanges, 1.0 idle; exchanges: 3.0 of rows, 0.0 of "
        "gradients and counts, 2.0 waiting for the others",
        "rank 1: 9.0 ms: 6.0 computing, 3.0 with nothing but exchanges, 0.0 idle; exchanges: 3.0 of rows, 0.0 of "
        "gradients and counts, 0.0 waiting for the others",
    ]


def import_all(names: list[str]) -> None:
    sys.path.insert(0, str(SCRIPTS))
    for name in names:
        importlib.import_module(name)


def test_every_script_can_be_imported() -> None:
    """What a script takes from the project is still there, under its name. TRL, which one is measured beside, is not
    installed."""
    names = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "bench_tiny_trl")
    status, output = forked(import_all, names)
    assert status == 0, output


def test_a_rollout_is_planned_with_the_drafts_that_were_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from check_loop import with_acceptance

    planned = Between(2.0, 6.0)
    plan = resolved_with(speculative_num_steps=2)
    shares = DRAFT_ACCEPTANCE.best, DRAFT_ACCEPTANCE.worst
    in_plan = [1 + share + share**2 for share in shares]
    none = with_acceptance(planned, plan, [{"draft_accept_length": 1.0}] * 2)
    assert (none.best, none.worst) == pytest.approx((2.0 * in_plan[0], 6.0 * in_plan[1]))
    half = with_acceptance(planned, plan, [{"draft_accept_length": 1.0}, {"draft_accept_length": 3.0}])
    assert (half.best, half.worst) == pytest.approx((none.best / 2, none.worst / 2))
    assert with_acceptance(planned, plan, [{}]) == planned


def resolved_with(**arguments: int) -> Any:
    """As much of a plan as tells SGLang's arguments."""
    return SimpleNamespace(resolved=SimpleNamespace(config=SimpleNamespace(sglang=SimpleNamespace(args=arguments))))


def test_memory_is_told_by_phase(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the moment at which a step was written down, going back through its phases."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from check_loop import Watch, settled

    seconds = {"seconds_rollout": 6.0, "seconds_train": 3.0, "seconds_update_weights": 0.4}
    lines = [{"step": step, **seconds} for step in (1, 2)]
    watch = Watch(tmp_path, interrupt_after=0, written={1: 9.4, 2: 18.8})
    rollout, train, update = (range(94, 154), range(154, 184), range(184, 188))
    sizes = dict.fromkeys(rollout, 100) | dict.fromkeys(train, 20) | dict.fromkeys(update, 30)
    sizes[187] = 90  # the engine's cache is back
    watch.memory = [(tenth / 10, [sizes.get(tenth, 999), 25]) for tenth in range(250)]
    assert watch.most_memory(settled(lines, 0)) == {"rollout": 100, "train": 25, "update_weights": 30}
    apart = watch.most_memory(settled(lines, 0), trainers=1)
    assert apart == {"rollout": 25, "train": 20, "update_weights": 30}, "the second GPU is an engine's"
    assert settled(lines, interrupt_after=1) == [], "a resumed run's first step loads kernels again"


def test_how_busy_gpus_were_is_told_of_settled_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from check_loop import Watch

    lines = [{"step": step, "seconds_step": 2.0} for step in (2, 4)]
    watch = Watch(tmp_path, interrupt_after=0, written={1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0})
    within = [(1.5, [50, 0]), (2.5, [70, 20]), (5.5, [90, 40]), (6.5, [30, 60])]
    watch.busy = [(0.5, [100, 100]), *within[:2], (4.0, [100, 100]), *within[2:], (7.5, [100, 100])]
    assert watch.busy_shares(lines) == [60, 30]
    assert Watch(tmp_path, interrupt_after=0, written=watch.written).busy_shares(lines) == []


def test_engines_are_measured_in_every_layout_of_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of each the plan has seconds; all of them together have the machine's sequences."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from check_decode import LAYOUTS, Layout, layout_flags
    from glm_flash import write_config

    write_config(tmp_path, moe_layers=5)
    common = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(tmp_path), "--prompt-data", "none"]
    found = {}
    for name in LAYOUTS:
        resolved = resolve([*common, *layout_flags(name, 2)])
        layout = Layout(name, resolved, Machine.described("H200", 2, "1TB", None, 2.5), Lengths(np.array([4096.0])))
        engine = layout.planned(Pace.BEST).engine
        found[name] = layout.engines, engine.layout.tp, engine.attention_groups
        each = 64 // layout.engines
        slow, fast = layout.token_s(each, 4096), layout.token_s(each // 2, 1024)
        assert 0 < fast.best <= slow.best <= slow.worst > fast.worst
    assert found == {"dp": (1, 2, 2), "tp": (1, 2, 1), "single": (2, 1, 1)}
