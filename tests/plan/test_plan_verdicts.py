"""What the plan says of the shipped recipes, of the specification's, and of machines that are too small."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recipe.config import Resolved, sglang_rules
from recipe.plan.activations import ActivationModel, Pack
from recipe.plan.flops import sequence_cost
from recipe.plan.hardware import GIB, Machine, named_gpu, parse_size
from recipe.plan.lengths import Lengths
from recipe.plan.memory import GpuModel, Phase, Use
from recipe.plan.options import PUBLISHED, resolve_without_weights
from recipe.plan.plan import Plan, make_plan
from recipe.plan.ranges import Pace
from recipe.plan.report import SCHEMA, as_json, page, refusal
from recipe.plan.speed import SpeedModel
from recipe.plan.suggest import suggestion
from recipe.plan.time_plan import Work
from recipe.run.planned import Planned
from recipe.system.errors import UserError

SHIPPED = ("8gpu", "8gpu-eagle", "8gpu-mtp", "16gpu", "24gpu")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether SGLang is installed or not."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


def resolved(recipe: str, *flags: str) -> Resolved:
    return resolve_without_weights(["--recipe", f"glm4.7-flash-{recipe}", "--hf-checkpoint", str(PUBLISHED), *flags])


def plan(recipe: str, *flags: str, gpu: str = "H100-80GB", host: str = "1TB", disk: str | None = "2TB") -> Plan:
    return make_plan(resolved(recipe, *flags), Machine.described(gpu, 8, host, disk, 2.5), on_gpu=True)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_shipped_recipe_fits_h100s_with_a_margin(recipe: str) -> None:
    made = plan(recipe)
    assert made.problems == ()
    assert made.gpu is not None
    assert min(one.margin for one in made.gpu.phases) > 4 * GIB
    for one in (*made.gpu.phases, *made.host):
        assert one.margin == one.capacity - sum(one.uses.values())


def test_the_8_gpu_recipe_needs_the_host_memory_of_its_optimizer() -> None:
    made = plan("8gpu")
    training = next(one for one in made.host if one.phase is Phase.TRAINING)
    assert training.uses[Use.OPTIMIZER] == pytest.approx(12 * sum(made.parameters.values()), rel=0.01)
    assert plan("8gpu", host="500GB").problems != ()
    larger = next(one for one in plan("16gpu").host if one.phase is Phase.TRAINING)
    assert larger.uses.keys() == {Use.PROCESSES, Use.ROUTING}


def test_the_routing_that_is_replayed_is_counted_in_host_memory() -> None:
    """46 layers of 4 experts: a byte each for every token of 256 samples, three times; and for what the caches of 8
    GPUs hold 4 bytes each, of 47 layers."""
    made = plan("8gpu")
    assert made.gpu is not None
    assert made.gpu.engine is not None
    longest = made.longest_sample
    expected = 3 * 256 * longest * 46 * 4 + 8 * made.gpu.engine.tokens * 47 * 4 * 4
    for one in made.host:
        assert one.uses[Use.ROUTING] == expected
    by_itself = "--no-use-rollout-routing-replay"
    recorded = plan("8gpu", by_itself, "--use-routing-replay", "--global-batch-size", "64")
    assert recorded.host[0].uses[Use.ROUTING] == 3 * 256 * longest * 46 * 4
    assert Use.ROUTING not in plan("8gpu", by_itself).host[0].uses


@pytest.mark.parametrize(
    ("recipe", "flags", "sentences"),
    [
        (
            "24gpu",
            ("--sglang-ep-num-redundant-experts", "16", "--sglang-dp-size", "3"),
            (
                "makes 80 experts of the model's 64, which --sglang-ep-size 24 does not divide; valid and nearest: "
                "8 (72 experts, 3 a GPU) or 32 (96 experts, 4 a GPU)",
                "gives attention TP 8, and 20 heads do not divide by it; valid with --sglang-enable-dp-attention: "
                "6, 12 or 24",
            ),
        ),
        (
            "8gpu",
            (
                *("--actor-num-nodes", "2", "--tensor-model-parallel-size", "4", "--sequence-parallel"),
                *("--pipeline-model-parallel-size", "2", "--context-parallel-size", "2"),
            ),
            ("--decoder-last-pipeline-num-layers 23 makes it 24+23",),
        ),
        ("8gpu", ("--tensor-model-parallel-size", "8"), ("the model's 20 attention heads; nearest that do: 5 or 10",)),
        (
            "8gpu",
            ("--global-batch-size", "100"),
            ("(ranks / TP / PP / CP); nearest that suit: 64 or 128",),
        ),
    ],
)
def test_the_specifications_layouts_are_refused_with_what_is_valid(
    recipe: str, flags: tuple[str, ...], sentences: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        resolved(recipe, *flags)
    for sentence in sentences:
        assert sentence in str(refused.value)


SMALL = {
    "a GPU's memory": ("8gpu", (), {"gpu": "H100=54.5"}),
    "no recomputation, no CPU Adam": (
        "8gpu",
        ("--no-optimizer-cpu-offload", "--no-overlap-cpu-optimizer-d2h-h2d", "--recompute-granularity", "selective"),
        {},
    ),
    "16 GPUs of 40 GB": ("16gpu", (), {"gpu": "A100-40GB"}),
    "a disk": ("8gpu", ("--save-keep", "100"), {"disk": "2TB"}),
    "a machine's memory": ("8gpu", (), {"host": "470GB", "gpu": "H200-141GB"}),
    "a large share for the engine": ("8gpu", ("--sglang-mem-fraction-static", "0.95"), {}),
}


def resolved_small(case: str) -> Plan:
    recipe, flags, machine = SMALL[case]
    base = resolved(recipe)
    if "selective" in flags:
        perf = base.config.perf.model_copy(
            update={"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
        )
        optimizer = base.config.optimizer.model_copy(
            update={"optimizer_cpu_offload": False, "overlap_cpu_optimizer_d2h_h2d": False}
        )
        base = replace(base, config=base.config.model_copy(update={"perf": perf, "optimizer": optimizer}))
        return make_plan(base, Machine.described("H100-80GB", 8, "1TB", "2TB", 2.5), on_gpu=True)
    return plan(recipe, *flags, **machine)


@pytest.mark.parametrize("case", SMALL)
def test_a_suggestion_fits_and_nothing_in_it_is_idle(case: str) -> None:
    made = resolved_small(case)
    assert not made.fits
    changes = suggestion(made)
    assert changes

    def with_changes(chosen: tuple) -> Plan:
        config = made.resolved.config
        for change in chosen:
            config = change.applied(config)
        return make_plan(replace(made.resolved, config=config), made.machine, on_gpu=True)

    assert with_changes(changes).fits
    for left_out in range(len(changes)):
        assert not with_changes(changes[:left_out] + changes[left_out + 1 :]).fits
    sentence = refusal(made, changes)
    assert sentence.endswith(f"it does with {' '.join(change.flags for change in changes)}")
    assert "\n" not in sentence


def test_the_mildest_change_is_suggested() -> None:
    [change] = suggestion(plan("16gpu", gpu="A100-40GB=44"))
    assert change.flags == "--optimizer-cpu-offload --optimizer-offload-fraction 0.75"
    milder = ("--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5")
    assert not plan("16gpu", *milder, gpu="A100-40GB=44").fits


def test_what_nothing_mends_is_said() -> None:
    made = plan("8gpu", gpu="A100-40GB", host="200GB")
    assert "use more or larger machines" in refusal(made, suggestion(made))


def peak(recipe: str, *flags: str) -> int:
    made = plan(recipe, *flags)
    assert made.gpu is not None
    return next(one for one in made.gpu.phases if one.phase is Phase.TRAINING).total


def test_each_knob_moves_the_peak_its_way() -> None:
    longer = [peak("8gpu", "--max-tokens-per-gpu", str(tokens)) for tokens in (16384, 32768, 65536)]
    assert all(before < after for before, after in pairwise(longer))
    chunks = [peak("8gpu", "--log-probs-chunk-size", str(size)) for size in (1024, 4096, 6144, 8192)]
    assert all(before <= after for before, after in pairwise(chunks))
    assert chunks[0] < chunks[-1]
    shares = [peak("8gpu", "--optimizer-offload-fraction", share) for share in ("1.0", "0.5", "0.0")]
    assert all(before < after for before, after in pairwise(shares))
    assert shares[2] - shares[0] == pytest.approx(12 * (shares[1] - shares[0]) / 6, rel=1e-6)


@pytest.mark.parametrize(("recompute", "measured_gib"), [((), 73.7), (FULL, 67.5)])
def test_peaks_on_one_h200_are_planned_within_half_a_hundredth(
    recompute: tuple[str, ...], measured_gib: float, tmp_path: Path
) -> None:
    """The two of docs/benchmarks.md: 6 layers at the true widths, 4 sequences of 2,048 tokens, four fifths asked."""
    document = json.loads((PUBLISHED / "config.json").read_text())
    document |= {"num_hidden_layers": 6, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(document))
    words = "--rm-type math --num-rollout 1 --rollout-batch-size 1 --n-samples-per-prompt 2 --lr 1e-6 --device cuda "
    words += "--rollout-max-response-len 1024 --actor-num-gpus-per-node 1 --rollout-engine embedded"
    flags = ["--hf-checkpoint", str(tmp_path), "--prompt-data", "/dev/null", *words.split(), *recompute]
    one = resolve_without_weights(flags)
    machine = Machine.described("H200", 1, "1TB", None, 0.0)
    model = GpuModel(one, machine, on_gpu=True, pack=Pack(tokens=8192, asked=4 * 1639, longest=2048, keys=8192))
    [shard] = model.shards
    total = sum(model.held(shard).values()) + sum(model.computing(shard).values())
    assert total / GIB == pytest.approx(measured_gib, rel=0.005)


@pytest.mark.parametrize(
    ("recipe", "gpu", "phase", "measured_gib"),
    [
        ("8gpu", "H200", Phase.TRAINING, 25.5),
        ("8gpu", "H200", Phase.UPDATE_WEIGHTS, 30.4),
        ("8gpu", "H200", Phase.ROLLOUT, 112.2),
        ("8gpu-mtp", "H100=79.2", Phase.TRAINING, 31.4),
        ("8gpu-mtp", "H100=79.2", Phase.UPDATE_WEIGHTS, 35.5),
        ("8gpu-mtp", "H100=79.2", Phase.ROLLOUT, 74.8),
    ],
)
def test_a_loop_on_two_gpus_peaks_where_it_was_measured(
    recipe: str, gpu: str, phase: Phase, measured_gib: float, tmp_path: Path
) -> None:
    """`scripts/check_loop.py glm4.7-flash-RECIPE` on two GPUs: 1 dense and 5 MoE layers at the true widths."""
    document = json.loads((PUBLISHED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"num_hidden_layers": 6}))
    words = "--actor-num-gpus-per-node 2 --expert-model-parallel-size 2 --rollout-num-gpus-per-engine 2 "
    words += "--sglang-dp-size 2 --sglang-ep-size 2 --sglang-max-running-requests 64 "
    words += "--sglang-cuda-graph-max-bs-decode 32 --rollout-max-response-len 256"
    one = resolved(recipe, "--hf-checkpoint", str(tmp_path), *words.split())
    made = make_plan(one, Machine.described(gpu, 2, "256GB", None, 2.5), on_gpu=True)
    assert made.gpu is not None
    [planned] = [found for found in made.gpu.phases if found.phase is phase]
    assert planned.total / GIB == pytest.approx(measured_gib, rel=0.05)


def test_the_mtp_layer_is_trained_as_a_layer_and_an_output_head_that_learns_nothing() -> None:
    a = resolved("8gpu-mtp").architecture
    deeper = a.model_copy(update={"num_hidden_layers": a.num_hidden_layers + 1})
    without, with_mtp, with_layer = sequence_cost(a), sequence_cost(a, trains_mtp=True), sequence_cost(deeper)
    assert with_mtp.quadratic == with_layer.quadratic
    joining, head = 2 * a.hidden_size**2, a.vocab_size * a.hidden_size
    further = with_mtp.linear - with_layer.linear
    assert further == pytest.approx(6 * joining + 4 * head, rel=1e-4)
    assert 1.05 < with_mtp(2048.0) / without(2048.0) < 1.12


def test_training_the_mtp_layer_takes_as_much_longer_as_was_measured(tmp_path: Path) -> None:
    """Forward and backward of 6 layers on one H200 took 1.07 to 1.15 s, and 1.47 to 2.01 s with it. Log-probs of the
    reference model, a third of training, need none of it."""
    document = json.loads((PUBLISHED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"num_hidden_layers": 6}))
    words = "--rm-type math --num-rollout 1 --rollout-batch-size 32 --n-samples-per-prompt 8 --lr 1e-6 --device cuda "
    words += "--rollout-max-response-len 256 --actor-num-gpus-per-node 1 --rollout-engine embedded "
    words += "--use-kl-loss --kl-loss-coef 1e-3"
    flags = ["--hf-checkpoint", str(tmp_path), "--prompt-data", "/dev/null", *words.split(), *FULL]
    seconds = []
    for mtp in ("", "--mtp-num-layers 1", "--mtp-num-layers 1 --enable-mtp-training"):
        one = resolve_without_weights([*flags, *mtp.split()])
        memory = GpuModel.of(one, Machine.described("H200", 1, "256GB", None, 2.5), on_gpu=True)
        lengths = Lengths(np.array([256.0]))
        seconds.append(SpeedModel(memory, lengths, lengths, Pace.BEST).learning())
    plain, carried, trained = (of_way[Work.TRAIN] for of_way in seconds)
    assert plain == carried
    assert 1.47 / 1.15 < trained / plain < 2.01 / 1.07
    assert [of_way[Work.LOG_PROBS] for of_way in seconds] == [plain / 3] * 3


def test_log_probs_take_no_exchange_for_the_mtp_layer_and_no_gradients() -> None:
    """Of the reference model on 8 GPUs; with four optimizer steps a rollout the policy's are asked for too."""
    seconds = []
    for further in ("", "--mtp-num-layers 1 --enable-mtp-training", "--global-batch-size 64"):
        one = resolved("8gpu", "--kl-loss-coef", "1e-3", *further.split())
        memory = GpuModel.of(one, Machine.described("H100", 8, "1TB", None, 2.5), on_gpu=True)
        lengths = Lengths.log_normal(4096, 0.6, 8192)
        seconds.append(SpeedModel(memory, lengths, lengths, Pace.WORST).learning()[Work.LOG_PROBS])
    plain, with_mtp, four_steps = seconds
    assert with_mtp == plain
    assert four_steps == pytest.approx(2 * plain, rel=1e-12)


def test_the_policys_logits_wait_while_the_mtp_layer_is_recomputed() -> None:
    """Its turn is the first: where logits come in small chunks, that is the fullest moment."""
    one = resolved("8gpu-mtp", "--log-probs-chunk-size", "512")
    model = GpuModel.of(one, Machine.described("H100", 8, "1TB", None, 2.5), on_gpu=True)
    counts = ActivationModel(one.architecture, one.config, model.pack, on_gpu=True)
    last = one.architecture.num_hidden_layers - 1
    recomputed = counts.layer(last) + counts.gradients_of_layer(last)
    found = counts.of_stage(model.shards[-1], 1)
    assert found.log_probs > counts.log_probs() + recomputed > 2 * counts.log_probs()


def test_pipeline_stages_keep_what_is_in_flight() -> None:
    one = resolved("16gpu")
    model = GpuModel.of(one, Machine.described("H100", 8, "1TB", None, 2.5), on_gpu=True)
    counts = ActivationModel(one.architecture, one.config, model.pack, on_gpu=True)
    first, last = model.shards
    assert counts.of_stage(first, 2).kept == 2 * counts.of_stage(first, 1).kept
    assert counts.of_stage(first, 1).log_probs == 0 < counts.of_stage(last, 1).log_probs


def test_the_json_has_the_documented_fields_and_the_page_ends_with_the_verdict() -> None:
    for made in (plan("8gpu"), plan("8gpu", host="200GB")):
        changes = () if made.fits else suggestion(made)
        document = json.loads(as_json(made, changes))
        assert document.keys() == SCHEMA.keys()
        assert document["fits"] == made.fits
        for phase in (*document["gpu"].values(), *document["host"].values()):
            assert phase["margin"] == phase["capacity"] - sum(phase["uses"].values())
        time = document["time"]
        for end in (0, 1):
            assert time["step_s"][end] == pytest.approx(sum(seconds[end] for seconds in time["seconds"].values()))
            evaluations = time["evaluations"] * time["evaluation_s"][end]
            assert time["run_hours"][end] * 3600 == pytest.approx(3000 * time["step_s"][end] + evaluations)
        assert time["evaluations"] == 151
        last = page(made, changes).splitlines()[-1]
        assert last.startswith("It fits: " if made.fits else "It does not fit: a machine needs ")


@pytest.mark.parametrize("recipe", [*SHIPPED, "8gpu-fast", "16gpu-fast", "24gpu-fast", "16gpu-async", "24gpu-async"])
def test_every_shipped_recipe_is_planned_as_json(recipe: str) -> None:
    """Every run writes that down, those too whose saves take no time of a step."""
    time = json.loads(as_json(plan(recipe), ()))["time"]
    assert {"rollout", "train"} <= time["tokens_per_s"].keys() <= {"rollout", "log-probs", "train"}
    saves = time["seconds"]["save"]
    assert (saves == [0.0, 0.0]) == recipe.endswith(("-fast", "-async"))


def test_a_watched_run_compares_the_memory_that_torch_counts(tmp_path: Path) -> None:
    made = plan("8gpu")
    (tmp_path / "plan.json").write_text(as_json(made, ()))
    planned = Planned.read(tmp_path)
    assert made.gpu is not None
    assert planned.gpu is not None
    assert planned.host is not None
    [training] = [phase for phase in made.gpu.phases if phase.phase is Phase.TRAINING]
    tensors = Use.WEIGHTS, Use.GRADIENTS, Use.ACTIVATIONS, Use.LOG_PROBS
    assert planned.gpu.total == sum(training.uses.get(use, 0) for use in tensors) < training.total
    assert planned.gpu.capacity == training.capacity
    assert planned.host.total == max(phase.total for phase in made.host)


def test_the_samples_that_a_run_writes_down_count() -> None:
    """256 of 4,096 tokens on average a rollout, and 8 of them token by token."""
    disk = plan("8gpu").disk
    assert disk.records == 3000 * 4096 * (256 * 6 + 8 * 40)
    assert disk.needed == 3 * disk.checkpoint + disk.records
    without = plan("8gpu", "--keep-token-groups", "0").disk
    assert without.records == 3000 * 4096 * 256 * 6


def test_twice_the_price_is_twice_the_money() -> None:
    machines = [Machine.described("H100", 8, "1TB", None, price) for price in (2.0, 4.0)]
    times = [make_plan(resolved("8gpu"), machine, on_gpu=True).time for machine in machines]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1].dollars.best == pytest.approx(2 * times[0].dollars.best)
    assert times[1].dollars.worst == pytest.approx(2 * times[0].dollars.worst)
    assert times[0].hours == times[1].hours


@pytest.mark.parametrize(
    ("text", "size"), [("1TB", 10**12), ("512GiB", 512 * 2**30), ("900 gb", 9 * 10**11), ("1.5T", 15 * 10**11)]
)
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_size(text, "--disk") == size


def test_what_is_no_size_and_no_gpu_is_a_sentence() -> None:
    with pytest.raises(UserError, match="--disk much is no size; write 1TB"):
        parse_size("much", "--disk")
    with pytest.raises(UserError, match="--host-memory 1000 has no unit: write 1000GB"):
        parse_size("1000", "--host-memory")
    with pytest.raises(UserError, match="--gpu H100-90GB is not known; did you mean H100-80GB"):
        named_gpu("H100-90GB")
    with pytest.raises(UserError, match="what follows = is the memory in GiB"):
        named_gpu("H100=big")
    assert named_gpu("H100=94").memory == 94 * GIB


def test_the_command_ends_with_2_for_what_does_not_fit() -> None:
    command = [sys.executable, "-m", "recipe.plan", "--recipe", "glm4.7-flash-8gpu", "--gpu", "H100=20"]
    ended = subprocess.run([*command, "--hf-checkpoint", str(PUBLISHED)], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("It does not fit")


def test_a_notice_that_is_too_short_to_save_in_is_told() -> None:
    def told(*flags: str) -> list[str]:
        return [warning for warning in plan("8gpu", *flags).warnings if "SIGTERM" in warning]

    assert told() == []
    [warning] = told("--sigterm-grace-s", "100")
    assert "takes 210 s at 2 GB/s, and a SIGTERM gives it --sigterm-grace-s 100: the run would end unsaved" in warning
