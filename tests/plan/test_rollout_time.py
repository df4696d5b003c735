"""Rollouts played through: identities, a simulation token by token, and what was measured on H200s."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.config import sglang_rules
from recipe.plan.decoding import Decoding
from recipe.plan.engine import EngineEstimate
from recipe.plan.generation import Generation
from recipe.plan.hardware import Machine, named_gpu
from recipe.plan.lengths import Lengths
from recipe.plan.memory import GpuModel
from recipe.plan.options import PUBLISHED, resolve_without_weights
from recipe.plan.plan import make_plan
from recipe.plan.playout import Turn, play
from recipe.plan.ranges import Between, Pace, range_text
from recipe.plan.time_plan import TimePlan, Work
from recipe.system.errors import UserError

ONE_GPU = (
    "--rollout-num-gpus-per-engine 1 --sglang-enable-dp-attention false --sglang-enable-dp-lm-head false "
    "--sglang-moe-dense-tp-size false --sglang-dp-size 1 --sglang-ep-size 1"
)
DRAFTS = (
    "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 "
    "--sglang-speculative-num-draft-tokens 4"
)
MEASURED_TOKENS = {1: 127, 32: 2635, 128: 6440, 256: 8254}
"""Tokens/s by requests at once, of docs/benchmarks.md: all layers, 256 tokens in and out, one H200."""


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether SGLang is installed or not."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


def linear(batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
    """A made-up time of a token that every argument bears on."""
    return 1.0 + 0.5 * batch + 0.25 * total + 0.125 * batch * context


def token_by_token(groups: list[np.ndarray], slots: int, prompt: float) -> float:
    """Seconds of the same engine, every token made by itself."""
    waiting = [list(group) for group in groups]
    running: list[list[list[int]]] = [[] for _ in groups]  # [tokens made, tokens to make]
    seconds = 0.0
    while any(waiting) or any(running):
        for queue, active in zip(waiting, running, strict=True):
            while queue and len(active) < slots:
                active.append([0, int(queue.pop(0))])
        counts = [len(active) for active in running]
        fullest = int(np.argmax(counts))
        context = prompt + np.mean([made for made, _ in running[fullest]]) + 0.5
        batch, total = np.array([counts[fullest]]), np.array([sum(counts)])
        seconds += float(linear(batch, total, np.array([context]))[0])
        for active in running:
            for sequence in active:
                sequence[0] += 1
        running = [[one for one in active if one[0] < one[1]] for active in running]
    return seconds


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=7), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 30),
)
def test_playing_spans_is_making_every_token(lengths: list[list[int]], slots: int, prompt: int) -> None:
    groups = [np.array(group) for group in lengths]
    played = play([Turn.of(group, slots) for group in groups], prompt, linear)
    assert played.seconds == pytest.approx(token_by_token(groups, slots, prompt))
    assert 0 <= played.tail_s <= played.seconds


def test_the_tail_is_what_the_longest_make_alone() -> None:
    turns = [Turn.of(np.array([1, 1, 1, 1, 1, 1, 1, 100]), 8)]
    played = play(turns, 10, lambda batch, total, context: np.ones(len(batch)))
    assert (played.seconds, played.tail_s) == (100, 99)


def test_an_engine_without_work_takes_no_time() -> None:
    assert play([Turn.of(np.zeros(0, dtype=np.int64), 4)], 10, linear).seconds == 0


@pytest.mark.parametrize(
    ("mean", "spread", "cap"), [(4096, 0.6, 8192), (8000, 0.6, 8192), (300, 2.0, 8192), (50, 0, 64)]
)
def test_lengths_have_the_mean_that_was_asked_for(mean: float, spread: float, cap: int) -> None:
    lengths = Lengths.log_normal(mean, spread, cap)
    assert lengths.mean == pytest.approx(mean, rel=0.005)
    assert lengths.quantiles.max() <= cap
    drawn = lengths.draw(256, seed=1)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert (drawn == lengths.draw(256, seed=1)).all()
    assert (np.sort(drawn) == np.sort(lengths.draw(256, seed=2))).all()


def test_lengths_that_cannot_be_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot have a mean of 9000 tokens"):
        Lengths.log_normal(9000, 0.6, 8192)
    with pytest.raises(UserError, match="holds no rollouts"):
        Lengths.of_run(tmp_path)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "000001.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        Lengths.of_run(tmp_path)


def test_a_runs_own_lengths_are_those_of_its_newest_rollouts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for rollout in range(8):
        lines = "".join(json.dumps({"response_length": 10 * rollout + n}) + "\n" for n in range(2))
        (tmp_path / "rollouts" / f"{rollout:06}.jsonl").write_text(lines)
    assert Lengths.of_run(tmp_path).quantiles.tolist() == [30, 31, 40, 41, 50, 51, 60, 61, 70, 71]
    assert Lengths.of_run(tmp_path).capped(50).quantiles.max() == 50


def estimate(flags: str) -> EngineEstimate:
    resolved = resolve_without_weights(
        ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED), *ONE_GPU.split(), *flags.split()]
    )
    return EngineEstimate(resolved.architecture, resolved.config, 512)


def tokens_per_s(decoding: Decoding, seconds: Callable[..., np.ndarray], at_once: int) -> float:
    """Of 256 tokens in and out."""
    batch = np.array([at_once])
    reading = 2 * decoding.active * 256 * at_once / (decoding.gpu.flops * 0.385)
    return at_once * 256 / (256 * float(seconds(batch, batch, np.array([384.0]))[0]) + reading)


@pytest.mark.parametrize("at_once", MEASURED_TOKENS)
def test_decoding_on_one_h200_lies_in_the_planned_range(at_once: int) -> None:
    """Within 15%: with random weights it is at the range's better end, for tokens ask for the same experts."""
    engine = estimate("--sglang-cuda-graph-max-bs-decode 160 --sglang-max-running-requests 256")
    best, worst = (Decoding(engine, named_gpu("H200"), pace) for pace in (Pace.BEST, Pace.WORST))
    measured = MEASURED_TOKENS[at_once]
    assert tokens_per_s(worst, worst.token, at_once) < 1.15 * measured
    assert tokens_per_s(best, best.token, at_once) > 0.85 * measured


TRITON = "--sglang-attention-backend triton --sglang-cuda-graph-max-bs-decode 256 --sglang-max-running-requests 256"
TWO_GPUS = "--rollout-num-gpus-per-engine 2 --sglang-dp-size 2 --sglang-ep-size 2"
TWO_DRAFTS = "--sglang-speculative-num-steps 2 --sglang-speculative-num-draft-tokens 3"
MILLISECONDS = {
    "one": {(1, 560): 7.76, (8, 1072): 10.24, (32, 1072): 15.08, (64, 4144): 34.72, (256, 560): 30.33},
    "two": {(4, 1072): 7.89, (16, 1072): 9.0, (64, 4144): 23.44, (128, 1072): 16.05, (256, 4144): 34.75},
    "drafts": {(8, 560): 5.99, (32, 1072): 24.46, (64, 1072): 40.18, (64, 4144): 121.33},
}
"""Of a token, by sequences and tokens before them, of docs/benchmarks.md: all layers, Triton's attention, one H200, two
with DP attention, and one with drafts of which 1.35 were accepted each time."""
FLAGS = {"one": TRITON, "two": f"{TRITON} {TWO_GPUS}", "drafts": f"{TRITON} {DRAFTS} {TWO_DRAFTS}"}


def engine_of(layout: str) -> EngineEstimate:
    """That was measured."""
    words = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED)]
    words += ("" if layout == "two" else ONE_GPU).split()
    resolved = resolve_without_weights([*words, *FLAGS[layout].split()])
    return EngineEstimate(resolved.architecture, resolved.config, 8192)


@pytest.mark.parametrize("layout", MILLISECONDS)
def test_a_token_of_all_layers_takes_what_was_measured_on_h200s(layout: str) -> None:
    """Between both ends, or within 10% of one."""
    engine = engine_of(layout)
    ends = [Decoding(engine, named_gpu("H200"), pace) for pace in (Pace.BEST, Pace.WORST)]
    for (sequences, tokens), measured in MILLISECONDS[layout].items():
        total, context = np.array([sequences]), np.array([float(tokens)])
        found = [1e3 * float(end.token(total / engine.attention_groups, total, context)[0]) for end in ends]
        if layout == "drafts":
            found = [one * end.acceptance_length / 2.35 for one, end in zip(found, ends, strict=True)]
        assert 0.9 * found[0] < measured < 1.1 * found[1], (sequences, tokens, found)


def gain_of_drafts(pace: Pace, sequences: int, context: float, flags: str) -> float:
    """Their tokens/s over those without."""
    at = np.array([sequences]), np.array([sequences]), np.array([context])
    plain, drafting = (
        float(Decoding(estimate(words), named_gpu("H200"), pace).token(*at)[0])
        for words in (flags, f"{flags} {DRAFTS}")
    )
    return plain / drafting


def test_drafts_pay_for_few_sequences_but_not_where_tritons_kernels_verify_long_ones() -> None:
    """There 8 sequences with 4,144 tokens before them took 24.2 ms a token with drafts and 12.9 without."""
    flags = "--sglang-cuda-graph-max-bs-decode 64 --sglang-max-running-requests 64"
    assert gain_of_drafts(Pace.BEST, 1, 4144, flags) > 1.5
    for pace in Pace:
        assert gain_of_drafts(pace, 8, 4144, f"{flags} --sglang-attention-backend triton") < 1


def test_drafts_stop_beyond_their_batch() -> None:
    limited = Decoding(estimate(f"--speculative-max-batch 8 {DRAFTS}"), named_gpu("H200"), Pace.BEST)
    batch, context = np.array([8, 9]), np.array([384.0, 384.0])
    few, many = limited.token(batch, batch, context)
    assert few == limited.drafted(batch, batch, context)[0]
    assert many == limited.plain(batch, batch, context)[1]


def slice_of(layers: int, folder: Path, flags: str) -> list[str]:
    """The 8-GPU recipe on two GPUs, with fewer layers and 256 tokens a response."""
    document = json.loads((PUBLISHED / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(document))
    words = "--actor-num-gpus-per-node 2 --expert-model-parallel-size 2 --rollout-max-response-len 256 "
    words += "--eval-interval none --eval-prompt-data none --sglang-cuda-graph-max-bs-decode 32"
    return ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(folder), *words.split(), *flags.split()]


@pytest.mark.parametrize(
    ("layers", "flags", "rollout_s", "update_s"),
    [
        (
            6,
            "--rollout-num-gpus-per-engine 2 --sglang-dp-size 2 --sglang-ep-size 2 --sglang-max-running-requests 64",
            (5.3, 6.3),
            (0.32, 0.37),
        ),
        (3, f"{ONE_GPU} --sglang-max-running-requests 32", (2.2, 2.2), (0.16, 0.20)),
        (
            3,
            f"{ONE_GPU} --sglang-max-running-requests 32 --no-colocate --rollout-num-gpus 1 "
            "--actor-num-gpus-per-node 1 --expert-model-parallel-size 1",
            (4.5, 6.1),
            (1.58, 1.60),
        ),
    ],
)
def test_phases_of_loops_on_two_h200s_lie_in_the_planned_range(
    layers: int, flags: str, rollout_s: tuple[float, float], update_s: tuple[float, float], tmp_path: Path
) -> None:
    """Those of docs/evidence.md, within 5%."""
    resolved = resolve_without_weights(slice_of(layers, tmp_path, flags))
    machine = Machine.described("H200", 2, "1TB", None, 0.0)
    time = make_plan(resolved, machine, on_gpu=True, lengths=Lengths(np.array([256.0]))).time
    assert time is not None
    for work, (least, most) in ((Work.ROLLOUT, rollout_s), (Work.UPDATE_WEIGHTS, update_s)):
        assert 0.95 * time.seconds[work].best < most
        assert least < 1.05 * time.seconds[work].worst


def rollout_of(flags: str) -> tuple[float, float]:
    """Seconds of a rollout of the 8-GPU recipe, and of its tail."""
    resolved = resolve_without_weights(
        ["--recipe", "glm4.7-flash-8gpu-fast", "--hf-checkpoint", str(PUBLISHED), *flags.split()]
    )
    memory = GpuModel.of(resolved, Machine.described("H100", 8, "1TB", None, 2.5), on_gpu=True)
    lengths = Lengths.log_normal(4096, 0.6, 8192)
    played = Generation(resolved, memory, lengths, lengths, Pace.BEST).rollout()
    return played.seconds, played.tail_s


def test_over_sampling_with_partial_rollouts_cuts_the_tail() -> None:
    """Twice the prompts are drawn, and what is left over goes on in the next rollout."""
    whole, tail = rollout_of("")
    partial, its_tail = rollout_of("--over-sampling-batch-size 64 --partial-rollout")
    thrown_away, _ = rollout_of("--over-sampling-batch-size 64")
    assert tail > 0.2 * whole
    assert its_tail < 0.6 * tail
    assert partial < 0.7 * whole
    assert thrown_away > whole


def test_money_and_hours_count_evaluations() -> None:
    time = TimePlan(
        seconds={Work.ROLLOUT: Between(10, 20), Work.TRAIN: Between.exactly(5)},
        tail=Between(1, 2),
        evaluation=Between(100, 200),
        evaluations=3,
        response_tokens=1000,
        tokens=2000,
        gpus=8,
        rollouts=12,
        price=3.0,
    )
    assert time.step_s == Between(15, 25)
    assert time.run_s == Between(12 * 15 + 300, 12 * 25 + 600)
    assert time.dollars == Between(480 * 24 / 3600, 900 * 24 / 3600)
    assert time.tokens_per_s(Work.ROLLOUT) == Between(100, 50)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Between(236.4, 3932), "240 to 3,900"),
        (Between(0.4, 0.44), "0.4 to 0.44"),
        (Between(101, 104), "100"),
        (Between(8500, 3600), "3,600 to 8,500"),
        (Between.exactly(0), "0"),
    ],
)
def test_figures_have_the_digits_that_they_deserve(found: Between, text: str) -> None:
    assert range_text(found) == text
