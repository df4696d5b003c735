"""Measuring a node for `make tune MEASURE=1`, as far as there is no GPU: what is asked of an engine, what comes of its
answers, and what the plan makes of that."""

import json
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from recipe.config import Architecture, Resolved, sglang_rules
from recipe.config.sglang_rules import size_of
from recipe.engines import launch
from recipe.plan.decode_points import DecodePoint, EngineKind, MeasuredDecoding
from recipe.plan.decoding import Decoding
from recipe.plan.engine import EngineEstimate
from recipe.plan.hardware import Machine, named_gpu
from recipe.plan.lengths import Lengths
from recipe.plan.measured_work import MeasuredWork, WorkKind
from recipe.plan.node import Rates, machine_as_measured, read_rates
from recipe.plan.options import PUBLISHED, resolve_without_weights
from recipe.plan.ranges import Pace
from recipe.plan.time_plan import Work
from recipe.plan.tune.__main__ import _parser as tune_parser
from recipe.smoke import decode, measure
from recipe.smoke.training import ComputesWrongly
from recipe.system.errors import UserError
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.tiny import write_tiny_checkpoint

NO_GRAPHS = "--sglang-disable-cuda-graph"
SMI = "#!/bin/sh\nfor n in $(seq {count}); do echo 'NVIDIA H100 80GB HBM3, 81559, 551, 4, 580.95.05'; done\n"


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


def resolved_of(recipe: str, *flags: str) -> Resolved:
    return resolve_without_weights(["--recipe", recipe, "--hf-checkpoint", str(PUBLISHED), *flags])


def kind_of(recipe: str) -> EngineKind:
    resolved = resolved_of(recipe)
    return EngineKind.of(resolved.architecture, resolved.config)


POINTS = tuple(DecodePoint(8 * each, tokens, 1e-3 * each * tokens) for each in (1, 16) for tokens in (512, 4096))
PLAIN = MeasuredDecoding(kind_of("glm4.7-flash-8gpu"), 1.0, POINTS)
KINDS = [
    WorkKind.of(work, resolved_of("glm4.7-flash-8gpu").architecture, resolved_of("glm4.7-flash-8gpu").config)
    for work in (Work.TRAIN, Work.OPTIMIZER, Work.UPDATE_WEIGHTS)
]
WORK = tuple(MeasuredWork(kind, 4.0, 2.0, 3.0) for kind in KINDS)
DRAFTING = MeasuredDecoding(kind_of("glm4.7-flash-8gpu-eagle"), 2.0, (DecodePoint(64, 1024, 7e-3),))


def decoding_of(recipe: str, pace: Pace, *flags: str) -> Decoding:
    resolved = resolved_of(recipe, *flags)
    engine = EngineEstimate(resolved.architecture, resolved.config, 8192)
    return Decoding(engine, named_gpu("H100"), pace, (PLAIN, DRAFTING))


def token(decoding: Decoding, each: int, context: float) -> float:
    """Seconds by which `each` sequences of every group have got a token more."""
    batch = np.array([each])
    return float(decoding.token(batch, batch * decoding.engine.attention_groups, np.array([context]))[0])


class CountingEngine(decode.Engine):
    """Answers at once, and says that it took 0.3 s and 10 ms a token and sequence."""

    cache_tokens = 2000

    def __init__(self, groups: int) -> None:
        super().__init__("", vocabulary=1000, groups=groups, seed=1)
        self.asked: list[list[list[int]]] = []
        self.noise = [0.0, 0.0, 0.1]

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:  # type: ignore[override]
        self.asked.append(prompts)
        return 0.3 + 0.01 * len(prompts) * tokens + self.noise[len(self.asked) % 3]


def test_a_points_seconds_are_those_of_decoding_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The quicker of two times counts."""
    engine = CountingEngine(groups=2)
    found = list(engine.points([1, 8, 16], [500, 100]))
    # 16 sequences of a group with 180 tokens each do not fit into 95% of its cache, nor do 8 with 580.
    assert [(point.sequences, point.context) for point in found] == [(2, 148), (16, 148), (2, 548)]
    assert [point.seconds for point in found] == pytest.approx([0.02, 0.16, 0.02])
    assert "holds no 8 or 16 sequences of 500 tokens: left out" in capsys.readouterr().out


def test_a_disturbed_measurement_is_none() -> None:
    engine = CountingEngine(groups=1)
    engine.seconds = lambda prompts, tokens: 1.0  # type: ignore[method-assign,assignment]
    with pytest.raises(UserError, match="something else keeps this machine busy"):
        engine.point(1, 10)


def test_prompts_are_read_once() -> None:
    """Longer ones, and more of them, begin with those before; before a point all of its prompts have been asked for."""
    engine = CountingEngine(groups=1)
    list(engine.points([2, 4], [8, 20]))
    whole = engine.prompts(4, 20)
    assert len({tuple(prompt) for prompt in whole}) == 4
    for asked in engine.asked:
        assert asked == [prompt[: len(asked[0])] for prompt in whole[: len(asked)]]
    sizes = [(len(asked), len(asked[0])) for asked in engine.asked]
    assert sizes == [(2, 8), (4, 8), *[(2, 8)] * 4, *[(4, 8)] * 4, (4, 20), *[(2, 20)] * 4, *[(4, 20)] * 4]


@pytest.mark.parametrize(("groups", "ranks"), [(1, [None] * 4), (2, [0, 1, 0, 1])])
def test_a_prompt_goes_where_it_was_read(groups: int, ranks: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of GPUs has a cache of its own."""
    bodies: list[dict[str, object]] = []

    async def ask(session: object, method: str, address: str, body: dict[str, object], **named: object) -> object:
        bodies.append(body)
        return {"meta_info": {"completion_tokens": 3}}

    monkeypatch.setattr(decode, "ask", ask)
    engine = decode.Engine("http://127.0.0.1:1", vocabulary=1000, groups=groups, seed=1)
    prompts = engine.prompts(4, 5)
    engine.seconds(prompts, 3)
    assert [body["input_ids"] for body in bodies] == prompts
    assert [body.get("routed_dp_rank") for body in bodies] == ranks


def test_the_engine_gets_room_for_what_is_measured() -> None:
    config = decode.widened(resolved_of("glm4.7-flash-8gpu").config, groups=8, most=64)
    assert size_of(config, "max_running_requests", default=0) == 64 * 8
    assert size_of(config, "cuda_graph_max_bs_decode", default=0) == 64


def test_an_engine_that_drafts_does_so_at_every_load_that_is_measured() -> None:
    flags = "--rollout-num-gpus-per-engine 1 --sglang-enable-dp-attention false --sglang-enable-dp-lm-head false"
    flags += " --sglang-moe-dense-tp-size false --sglang-dp-size 1 --sglang-ep-size 1 --speculative-max-batch 8"
    config = resolved_of("glm4.7-flash-8gpu-eagle", *flags.split(), NO_GRAPHS).config
    assert config.sglang.speculative_max_batch == 8
    wide = decode.widened(config, groups=1, most=64)
    assert wide.sglang.speculative_max_batch is None
    assert "disable_cuda_graph" not in wide.sglang.args


def test_a_draft_is_the_mtp_layer_of_a_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_tiny_checkpoint(whole, seed=1)
    architecture = Architecture.from_checkpoint(whole)
    decode.write_draft(tmp_path / "draft", whole, architecture)
    [file] = (tmp_path / "draft").glob("*.safetensors")
    mtp = f"model.layers.{architecture.num_hidden_layers}."
    shapes = {name: tuple(header.shape) for name, header in HuggingFaceCheckpoint(whole).headers.items()}
    expected = {name: shape for name, shape in shapes.items() if name.startswith(mtp)}
    assert expected
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == expected
    assert Architecture.from_checkpoint(tmp_path / "draft") == architecture


def test_weights_are_random_only_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: Path("python"))
    monkeypatch.setattr(launch, "find_sglang_python", lambda named: Path("python"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    shutil.copy(PUBLISHED / "config.json", checkpoint)
    resolved = resolved_of("glm4.7-flash-8gpu")
    model = resolved.config.model.model_copy(update={"hf_checkpoint": checkpoint})
    resolved = replace(resolved, config=resolved.config.model_copy(update={"model": model}))

    def words(folder: str) -> list[str]:
        (tmp_path / folder).mkdir()
        return list(decode.launch_of(resolved, tmp_path / folder, 1024, 1.0).arguments)

    random = words("a")
    assert random[random.index("--model-path") + 1] == str(tmp_path / "a")
    assert "dummy" in random
    assert (tmp_path / "a" / "config.json").exists()
    (checkpoint / "model-00001-of-00048.safetensors").touch()
    real = words("b")
    assert real[real.index("--model-path") + 1] == str(checkpoint)
    assert "dummy" not in real


@pytest.mark.parametrize("pace", Pace)
def test_the_plan_is_what_was_measured(pace: Pace) -> None:
    """At both ends: it is no range any more. Between two points it lies between both."""
    plain = decoding_of("glm4.7-flash-8gpu-fast", pace)
    for point in PLAIN.points:
        assert token(plain, point.sequences // 8, point.context) == pytest.approx(point.seconds)
    assert PLAIN.points[0].seconds < token(plain, 1, 2000) < PLAIN.points[1].seconds
    assert PLAIN.points[0].seconds < token(plain, 4, 512) < PLAIN.points[2].seconds
    drafting = decoding_of("glm4.7-flash-8gpu-eagle", pace, "--sglang-cuda-graph-max-bs-decode", "64")
    measured = DRAFTING.points[0].seconds * 2.0
    assert token(drafting, 8, 1024) == pytest.approx(measured / drafting.acceptance_length)


def test_between_points_logarithms_count() -> None:
    at_one_second = PLAIN.ratio(lambda sequences, context: 1.0, np.array([1, 4, 4]), np.array([512, 512, 1448.15]))
    corners = 1e-3 * np.array([512, 16 * 512, 4096, 16 * 4096])
    expected = [corners[0], corners[:2].mean(), corners.mean()]
    assert at_one_second == pytest.approx(np.array(expected), rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--rollout-num-gpus-per-engine 4 --sglang-dp-size 4 --sglang-ep-size 4",
        "--sglang-attention-backend triton",
        "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 1 --sglang-speculative-eagle-topk 1",
    ],
)
def test_an_engine_of_another_kind_stays_as_planned(flags: str) -> None:
    other = decoding_of("glm4.7-flash-8gpu-fast", Pace.BEST, *flags.split())
    assert token(other, 4, 512) == token(replace(other, measured=()), 4, 512)


def test_what_a_layer_takes_without_a_graph_comes_on_top() -> None:
    graphs, none = (decoding_of("glm4.7-flash-8gpu-fast", Pace.BEST, *flags) for flags in ([], [NO_GRAPHS]))
    batch = np.array([4])
    assert token(none, 4, 512) == pytest.approx(token(graphs, 4, 512) + float(none.eager(batch)[0]))
    assert none.eager(batch)[0] > 0


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    rates = Rates(host_memory=3e11, matmul=7e14, decoding=(PLAIN, DRAFTING))
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(rates)))
    assert read_rates(path) == rates
    document = json.loads(path.read_text())
    for wrong in (None, 0, -1e-4):
        document["decoding"][0]["points"][1]["seconds"] = wrong
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=r"decoding\.0\.points\.1\.seconds: .*: name the rates\.json"):
            read_rates(path)


@pytest.mark.parametrize(("count", "sentence"), [(0, "no GPU to measure"), (2, "has 8 GPUs, and this machine 2")])
def test_a_node_with_too_few_gpus_is_a_sentence(
    count: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(count, tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["measure", *FLAGS, "--output", str(tmp_path / "rates.json")])
    with pytest.raises(UserError, match=sentence):
        measure.main()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--gpu", "H200"], "--gpu: this machine is measured"),
        (["--rates", "rates.json", "--disk", "1TB"], "--disk or --rates: this machine is measured"),
        (["--write", "mine.txt"], "ends in .toml"),
        (["--write", "mine.toml"], "the image keeps runs/ and build/ only: try runs/mine.toml"),
    ],
)
def test_what_would_fail_in_the_end_is_told_before_anything_is_measured(
    given: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(8, tmp_path, monkeypatch)
    monkeypatch.setattr(measure, "inside_image", lambda: "mine.toml" in given)
    monkeypatch.setattr("sys.argv", ["measure", *FLAGS, *given, "--output", str(tmp_path / "rates.json")])
    with pytest.raises(UserError, match=sentence):
        measure.main()


FLAGS = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED), "--num-rollout", "100"]


def use_gpus(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has so many H100s, by nvidia-smi."""
    command = folder / "nvidia-smi"
    command.write_text(SMI.format(count=count))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_measuring_ends_in_tuning_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`recipe.plan.tune` is asked about this machine, by what was measured, with the flags that were given."""
    use_gpus(8, tmp_path, monkeypatch)
    output = tmp_path / "runs" / "rates.json"
    asked: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if "recipe.smoke.rates" in command:
            output.write_text(json.dumps({"host_memory": 1e11}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", with_smi(run))
    monkeypatch.setattr(measure, "running_engine", lambda *arguments: nullcontext(CountingEngine(groups=8)))
    monkeypatch.setattr(measure, "measure_decoding", lambda *arguments: PLAIN)
    monkeypatch.setattr(measure, "measure_training", lambda *arguments: WORK[:2])
    monkeypatch.setattr(measure, "measure_update", lambda *arguments: WORK[2:])
    given = ["--response-len", "3000", "--price", "3", "--best", "1"]
    monkeypatch.setattr("sys.argv", ["measure", *FLAGS, *given, "--output", str(output)])
    assert measure.main() == 0
    printed = capsys.readouterr().out
    assert "the given recipe costs $" in printed
    assert "optimizer: 4 s, planned 2 to 3 s" in printed
    assert read_rates(output) == Rates(host_memory=1e11, decoding=(PLAIN,), work=WORK)
    options, flags = tune_parser().parse_known_args(asked[-1][3:])
    assert flags == FLAGS
    assert (options.rates, options.response_len, options.price, options.best) == (output, 3000, 3, 1)
    machine = measure.machine_of(options, resolved_of("glm4.7-flash-8gpu").config)
    assert machine.decoding == (PLAIN,)
    assert machine.work == WORK
    assert machine.gpu.memory == pytest.approx((81559 - 551) << 20, rel=1e-3)
    sheet = replace(machine, decoding=(), work=())
    assert machine_as_measured(sheet, read_rates(output)) == machine


def test_what_was_measured_before_a_part_failed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "rates.json"

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        output.write_text(json.dumps({"host_memory": 1e11}))
        return subprocess.CompletedProcess(command, 0)

    def refuse(*arguments: object) -> None:
        raise UserError("the engine takes no weights")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(measure, "running_engine", lambda *arguments: nullcontext(CountingEngine(groups=8)))
    monkeypatch.setattr(measure, "measure_decoding", lambda *arguments: PLAIN)
    monkeypatch.setattr(measure, "measure_training", lambda *arguments: WORK[:2])
    monkeypatch.setattr(measure, "measure_update", refuse)
    resolved, sheet = resolved_of("glm4.7-flash-8gpu"), Machine.described("H100", 8, "1TB", None, 2.5)
    with pytest.raises(UserError, match="takes no weights"):
        measure.measure(resolved, sheet, Lengths.log_normal(3000, 0.6, 8192), output)
    assert read_rates(output) == Rates(host_memory=1e11, decoding=(PLAIN,), work=WORK[:2])


def test_a_trainer_that_cannot_be_measured_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And stays as planned: the engine, and what it takes, are measured all the same."""
    output = tmp_path / "rates.json"

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        output.write_text(json.dumps({"host_memory": 1e11}))
        return subprocess.CompletedProcess(command, 0)

    def fail(*arguments: object) -> None:
        raise UserError("a training step cannot be measured: OutOfMemoryError: CUDA out of memory.")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(measure, "running_engine", lambda *arguments: nullcontext(CountingEngine(groups=8)))
    monkeypatch.setattr(measure, "measure_decoding", lambda *arguments: PLAIN)
    monkeypatch.setattr(measure, "measure_training", fail)
    monkeypatch.setattr(measure, "measure_update", lambda *arguments: WORK[2:])
    resolved, sheet = resolved_of("glm4.7-flash-8gpu"), Machine.described("H100", 8, "1TB", None, 2.5)
    rates = measure.measure(resolved, sheet, Lengths.log_normal(3000, 0.6, 8192), output)
    assert rates == read_rates(output) == Rates(host_memory=1e11, decoding=(PLAIN,), work=WORK[2:])
    told = "training stays as planned: a training step cannot be measured: OutOfMemoryError: CUDA out of memory.\n"
    assert capsys.readouterr().err == told

    def compute_wrongly(*arguments: object) -> None:
        raise ComputesWrongly("this machine computes wrongly")

    monkeypatch.setattr(measure, "measure_training", compute_wrongly)
    with pytest.raises(ComputesWrongly):
        measure.measure(resolved, sheet, Lengths.log_normal(3000, 0.6, 8192), output)


def with_smi(run: object) -> object:
    """`subprocess.run` for all but nvidia-smi, which is really asked."""
    real = subprocess.run

    def choose(command: list[str], **named: object) -> object:
        chosen = real if "nvidia-smi" in command[0] else run
        return chosen(command, **named)  # type: ignore[operator]

    return choose
