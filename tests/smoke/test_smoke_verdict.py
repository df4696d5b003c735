"""The verdict on nodes, good and bad, and the table, from made-up measurements."""

from dataclasses import replace

import pytest

from recipe.plan.hardware import GPUS, Gpu
from recipe.plan.machine import FoundGpu, FoundMachine
from recipe.plan.memory import Phase
from recipe.plan.node import REFERENCE_MATMUL_SHARE, Rates, gpu_as_measured
from recipe.plan.ranges import Pace
from recipe.smoke.measured import Interruption, Learning, Measured, Memory, goes_on, learning_of
from recipe.smoke.projection import project
from recipe.smoke.table import NOT_MEASURED, NOT_ON_A_CPU, render, rows
from recipe.smoke.verdict import reasons

GIB = 2**30
H100 = FoundGpu("NVIDIA H100 80GB HBM3", 81000 << 20, 0, "580.95.05")
MACHINE = FoundMachine(
    gpus=(H100,) * 8, linked=True, host_memory=10**12, shared_memory=64 * GIB, disk=2 * 10**12, open_files=65536
)
KIND = GPUS["H100-80GB"]
RATES = Rates(host_memory=250e9, matmul=720e12, gpu_memory=3e12, bus=50e9, all_reduce=380e9)
LEARNING = Learning(
    steps=40,
    before=0.38,
    after=0.97,
    step_s=1.2,
    update_s=0.2,
    logprob_diff_mean=0.012,
    logprob_kl=0.001,
    accept_length=2.1,
    first_accept_length=1.9,
)
INTERRUPTION = Interruption(status=75, step=12, save_s=3.0, last_words="NCCL hung", resumed_status=0, goes_on=True)
GOOD = Measured(
    machine=MACHINE,
    gpus=8,
    kind=KIND,
    findings=(),
    rates=RATES,
    learning=LEARNING,
    interruption=INTERRUPTION,
    memory=Memory(planned=70 * GIB, phase=Phase.ROLLOUT, measured=69 * GIB),
    first_token_s=55.0,
    projection=project(MACHINE, 8, KIND, RATES, price=2.5),
    seconds={"warm-up": 60.0, "GRPO": 90.0},
)


def test_a_good_node_is_good() -> None:
    assert reasons(GOOD) == []
    assert render(rows(GOOD), []).endswith("\nthis node is good")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"findings": ("the driver is old",)}, "the driver is old"),
        ({"failures": ("the warm-up ended with status 1: no",)}, "the warm-up ended with status 1: no"),
        (
            {"rates": replace(RATES, matmul=400e12)},
            "bf16 matrix products reach 400 TFLOP/s, 40% of the data sheet's 989 (at least 65%)",
        ),
        ({"rates": replace(RATES, gpu_memory=2e12)}, "GPU memory reaches 2000 GB/s, 60% of the data sheet's 3350"),
        ({"rates": replace(RATES, bus=12e9)}, "copies to and from the host reach 12 GB/s, 19% of the data sheet's 64"),
        ({"rates": replace(RATES, all_reduce=40e9)}, "NCCL's all-reduce reaches 40 GB/s, 9% of the data sheet's 450"),
        ({"rates": replace(RATES, host_memory=50e9)}, "host memory reaches 50 GB/s, and CPU Adam of 8 GPUs needs 64"),
        ({"learning": replace(LEARNING, before=0.7)}, "the warm-up left nothing to learn: held-out 0.70"),
        (
            {"learning": replace(LEARNING, after=0.6)},
            "it did not learn: held-out 0.38 before and 0.60 after 40 steps, below 0.9",
        ),
        ({"learning": replace(LEARNING, after=None)}, "GRPO was not scored after its steps"),
        ({"learning": replace(LEARNING, logprob_diff_mean=0.2)}, "trainer and engine differ by 0.200 nats a token"),
        (
            {"learning": replace(LEARNING, accept_length=1.05, first_accept_length=1.06)},
            "drafts are hardly accepted: 1.05 tokens a verification",
        ),
        ({"learning": replace(LEARNING, accept_length=1.5)}, "drafts are accepted less and less: 1.90"),
        (
            {"interruption": replace(INTERRUPTION, status=-9)},
            "SIGTERM after step 12 ended with status -9, not saved with 75: NCCL hung",
        ),
        ({"interruption": replace(INTERRUPTION, resumed_status=2)}, "the resumed run ended with status 2: NCCL hung"),
        ({"interruption": replace(INTERRUPTION, goes_on=False)}, "the resumed run does not go on from step 12"),
        (
            {"projection": project(replace(MACHINE, host_memory=200 * 10**9), 8, KIND, RATES, price=2.5)},
            "glm4.7-flash-8gpu-mtp does not fit: a machine needs",
        ),
    ],
)
def test_a_bad_node_is_bad_for_one_reason(change: dict[str, object], reason: str) -> None:
    found = reasons(replace(GOOD, **change))
    assert len(found) == 1
    assert reason in found[0]
    assert f"this node is not good: because {found[0]}" in render(rows(replace(GOOD, **change)), found)


def test_every_row_has_its_figures() -> None:
    table = dict(rows(GOOD))
    assert NOT_MEASURED not in table.values()
    assert table["GPUs"] == "8 x NVIDIA H100 80GB HBM3, 79.1 GiB"
    assert table["bf16 matmul"] == "720 TFLOP/s, 73% of the data sheet's"
    assert table["memory"] == "70.0 GiB a GPU planned (rollout), 69.0 measured (-1.4%)"
    assert table["learned"] == "held-out 0.380 (at most 0.5) to 0.970 (at least 0.9) in 40 steps"
    assert table["this took"] == "150 s (warm-up 60, GRPO 90)"


def test_one_gpu_and_a_cpu_have_the_same_rows() -> None:
    one = replace(GOOD, gpus=1, machine=replace(MACHINE, gpus=(H100,)), rates=replace(RATES, all_reduce=None))
    assert dict(rows(one))["NCCL all-reduce"] == "one GPU"
    assert reasons(one) == []
    cpu = Measured(machine=replace(MACHINE, gpus=()), gpus=0, kind=None, findings=(), rates=Rates(host_memory=20e9))
    assert [row.what for row in rows(cpu)] == [row.what for row in rows(one)] == [row.what for row in rows(GOOD)]
    assert dict(rows(cpu))["bf16 matmul"] == dict(rows(cpu))["driver"] == NOT_ON_A_CPU


def test_a_node_at_the_reference_rates_is_planned_as_the_data_sheet_says() -> None:
    sheet = Rates(
        host_memory=300e9,
        matmul=KIND.flops * REFERENCE_MATMUL_SHARE,
        gpu_memory=KIND.memory_bandwidth * 0.9,
        bus=KIND.pcie_bandwidth * 0.85,
        all_reduce=KIND.link_bandwidth * 0.7,
    )
    planned = gpu_as_measured(KIND, sheet)
    assert figures(planned) == pytest.approx(figures(KIND))
    usual = project(MACHINE, 8, KIND, sheet, price=2.5)
    slow = project(MACHINE, 8, KIND, replace(sheet, matmul=sheet.matmul and sheet.matmul / 2), price=5.0)
    for pace in Pace:
        train = usual.phases["train"].at(pace)
        assert 1.5 * train < slow.phases["train"].at(pace) < 2 * train
        longer = slow.seconds.at(pace) / usual.seconds.at(pace)
        assert slow.dollars.at(pace) == pytest.approx(2 * usual.dollars.at(pace) * longer)
    # Two GPUs with a quarter of a node's host bandwidth are planned as a whole node.
    quarter = project(MACHINE, 2, KIND, replace(sheet, host_memory=75e9, gpus=2), price=2.5)
    assert quarter.seconds == usual.seconds


def figures(gpu: Gpu) -> tuple[float, ...]:
    return gpu.flops, gpu.memory_bandwidth, gpu.link_bandwidth, gpu.pcie_bandwidth


def line(step: int, **more: float) -> dict[str, float]:
    measured = {
        "samples": 256,
        "samples_per_second": 128.0,
        "seconds_update_weights": 0.5,
        "logprob_diff_mean": 0.01 * step,
        "logprob_kl": 0.001,
        "draft_accept_length": 1.0 + step / 10,
    }
    return {"step": step, **(measured if step else {}), **more}


def test_learning_is_read_from_the_metrics() -> None:
    lines = [line(0, **{"eval/heldout": 0.4}), *map(line, range(1, 8)), line(8, **{"eval/heldout": 0.95})]
    learning = learning_of(lines)
    assert learning is not None
    assert (learning.steps, learning.before, learning.after) == (8, 0.4, 0.95)
    assert (learning.step_s, learning.update_s) == (2.0, 0.5)
    assert learning.logprob_diff_mean == pytest.approx(0.045)
    assert (learning.first_accept_length, learning.accept_length) == pytest.approx((1.15, 1.75))
    assert learning_of(lines[:1]) is None


def test_a_run_goes_on_if_it_keeps_what_was_and_counts_up() -> None:
    before, whole = list(map(line, range(3))), list(map(line, range(6)))
    assert goes_on(before, whole, last=5)
    assert not goes_on(before, [*whole[:4], whole[5]], last=5), "a step is missing"
    assert not goes_on(before, whole[:5], last=5), "it stopped early"
    assert not goes_on(before, [line(0), line(1, seconds_step=2.0), *whole[2:]], last=5), "a step was made again"
