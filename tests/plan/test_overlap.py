"""Rollouts beside training: the engines' pace against the loop played token by token, and the plan of such a run."""

import json
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.config import sglang_rules
from recipe.config.flags import parse_command_line
from recipe.config.loading import bases_of, read_settings
from recipe.plan.colocated import colocated_twin
from recipe.plan.hardware import GIB, Machine
from recipe.plan.memory import Phase, Use
from recipe.plan.options import PUBLISHED, machine_of, read_without_weights
from recipe.plan.overlap import Pipeline, rollouts_to_play
from recipe.plan.plan import Plan, make_plan
from recipe.plan.playout import Turn, play
from recipe.plan.report import as_json, comparison, page
from recipe.plan.time_plan import OF_ENGINES, Side, TimePlan, Work
from recipe.plan.tune.search import Tuner, has_margin
from recipe.plan.tune.space import engines, splits, trainers
from recipe.plan.tune.table import table

ASYNC = ("16gpu", "24gpu")
IN_TURN = "--no-async-rollout --max-staleness none --async-order none --update-weight-in-flight none"
"""The same GPUs, and nothing generated beside training."""
FIXED = "--async-order fixed --update-weight-in-flight none"


@pytest.fixture(autouse=True)
def without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results whether SGLang is installed or not."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)


def token_time(batch: np.ndarray, total: np.ndarray, context: np.ndarray) -> np.ndarray:
    """A made-up time of a token, of which a third does not grow with the load."""
    return 1.0 + 0.2 * batch + 0.001 * batch * context


def pipeline(lengths: list[int], slots: int, staleness: int) -> Pipeline:
    """The same rollout again and again."""
    samples = np.tile(np.array(lengths), (rollouts_to_play(staleness), 1))
    return Pipeline(samples, places=1, slots=slots, prompt=10, token_time=token_time, reading_s=0.0)


def step_of_the_loop(lengths: list[int], slots: int, staleness: int, training_s: float, steps: int = 24) -> float:
    """Seconds of a step, of the engine's and the trainer's loop carried out token by token: rollout r is begun as soon
    as version r - staleness is there, and trained when all of it and the step before are done."""
    now, version, begun, trained_at = 0.0, 0, 0, np.inf
    queue: deque[tuple[int, int]] = deque()
    running: list[list[int]] = []  # [rollout, tokens made, tokens to make]
    left: dict[int, int] = {}
    ends = [0.0]
    while version < steps:
        while begun - staleness <= version and begun < steps:
            queue.extend((begun, length) for length in lengths)
            left[begun] = len(lengths)
            begun += 1
        while queue and len(running) < slots:
            rollout, length = queue.popleft()
            running.append([rollout, 0, length])
        if trained_at == np.inf and left.get(version) == 0:
            trained_at = now + training_s
        if running:
            batch, made = len(running), np.mean([one[1] for one in running])
            seconds = float(token_time(np.array([batch]), np.array([batch]), np.array([10 + made + 0.5]))[0])
            now += seconds
            for one in running:
                one[1] += 1
                left[one[0]] -= one[1] == one[2]
            running = [one for one in running if one[1] < one[2]]
        else:
            now = trained_at
        if now >= trained_at:
            version, trained_at = version + 1, np.inf
            ends.append(now)
    usual = ends[steps // 2 : steps - staleness]
    return (usual[-1] - usual[0]) / (len(usual) - 1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(30, 200), min_size=4, max_size=12),
    st.sampled_from([4, 16, 64]),
    st.integers(1, 3),
    st.floats(0.0, 2.0),
)
def test_a_step_takes_what_the_loop_takes(lengths: list[int], slots: int, staleness: int, share: float) -> None:
    """Of an engine with few slots and with many, and trainers from none to twice as slow as a rollout."""
    one = pipeline(lengths, slots, staleness)
    alone = play([Turn.of(np.array(lengths), slots)], 10, token_time).seconds
    training_s = share * alone
    planned = max(one.steady(training_s, staleness).seconds, training_s)
    assert planned == pytest.approx(step_of_the_loop(lengths, slots, staleness, training_s), rel=0.1)
    assert planned <= 1.001 * max(alone, training_s)


def test_rollouts_far_apart_take_what_each_takes_alone() -> None:
    lengths = [5, 40, 12, 100, 7, 64]
    one = pipeline(lengths, 4, 1)
    alone = play([Turn.of(np.array(lengths), 4)], 10, token_time)
    found = one.paced(one.largest_gap)
    assert found.step.seconds == pytest.approx(alone.seconds)
    assert found.latency_s == pytest.approx(alone.seconds)
    assert found.step.tail_s == pytest.approx(alone.tail_s)


def test_places_and_engines_without_a_sample_take_no_time() -> None:
    one = pipeline([10, 20], 2, 1)
    assert replace(one, places=3).steady(5, 1) == replace(one, places=2).steady(5, 1)
    few = "--rollout-batch-size 4 --global-batch-size 32 --rollout-num-gpus-per-engine 1 --sglang-dp-size "
    few += "false --sglang-enable-dp-attention false --sglang-enable-dp-lm-head false --sglang-ep-size false "
    few += "--sglang-moe-dense-tp-size false"
    assert time_of("16gpu-async", few).step_s.best > 0, "4 groups for 8 engines"


def test_what_is_under_way_at_an_update_is_read_again() -> None:
    """Two sequences of 10 tokens and a prompt of 10 run all the time, and have 15 tokens each on the mean."""
    one = pipeline([10, 10], 2, 1)
    assert one.paced(10).held == pytest.approx(30)
    assert replace(one, again_s=0.5).steady(0, 1).seconds == pytest.approx(one.steady(0, 1).seconds + 15)
    keep, recompute = (
        time_of("16gpu-async", f"--update-weight-in-flight {cache}").seconds[Work.ROLLOUT]
        for cache in ("keep", "recompute")
    )
    assert keep.best + 0.1 < recompute.best < keep.best + 10


def plan(recipe: str, flags: str = "") -> Plan:
    words = ["--recipe", f"glm4.7-flash-{recipe}", "--hf-checkpoint", str(PUBLISHED), *flags.split()]
    return make_plan(read_without_weights(words)[1], Machine.described("H100", 8, "1TB", "2TB", 2.5), on_gpu=True)


def time_of(recipe: str, flags: str = "") -> TimePlan:
    time = plan(recipe, flags).time
    assert time is not None
    return time


@pytest.mark.parametrize("recipe", ASYNC)
def test_a_step_is_the_slower_side(recipe: str) -> None:
    time = time_of(f"{recipe}-async")
    trainer, generating = time.sides[Side.TRAINER], time.sides[Side.ENGINES]
    assert generating.seconds == time.seconds[Work.ROLLOUT] + time.seconds[Work.UPDATE_WEIGHTS]
    assert trainer.seconds.best == pytest.approx(
        sum(seconds.best for work, seconds in time.seconds.items() if work is not Work.ROLLOUT)
    )
    assert time.step_s == generating.seconds
    assert generating.idle.best == generating.idle.worst == 0
    assert trainer.idle.best == pytest.approx(1 - trainer.seconds.best / time.step_s.best)
    assert trainer.gpus + generating.gpus == time.gpus == int(recipe.removesuffix("gpu"))
    assert set(OF_ENGINES) <= time.seconds.keys()


def test_in_fixed_order_the_longest_response_is_waited_for_and_training_costs_nothing() -> None:
    """One rollout after the other: no step lasts less than a rollout and the update."""
    in_turn, fixed = time_of("16gpu-async", IN_TURN), time_of("16gpu-async", FIXED)
    assert fixed.step_s == fixed.seconds[Work.ROLLOUT] + fixed.seconds[Work.UPDATE_WEIGHTS]
    assert fixed.seconds == in_turn.seconds
    assert in_turn.step_s.best - fixed.step_s.best == pytest.approx(
        sum(in_turn.seconds[work].best for work in (Work.TRAIN, Work.OPTIMIZER, Work.SAVE))
    )
    nothing_ahead = "--max-staleness 0 --async-order none --update-weight-in-flight none"
    assert time_of("16gpu-async", nothing_ahead).step_s == in_turn.step_s
    assert time_of("16gpu-async").step_s.worst < fixed.step_s.worst


def test_more_staleness_makes_a_step_shorter_until_the_engines_are_full() -> None:
    steps = [time_of("16gpu-async", f"--max-staleness {n}").step_s.middle for n in (1, 2, 4)]
    assert steps[0] > 1.1 * steps[1] > 1.1 * steps[2]


def test_a_run_of_one_rollout_costs_as_much_as_without() -> None:
    """Nothing goes on beside it."""
    times = [time_of("24gpu-async", f"--num-rollout 1 {flags}") for flags in ("", IN_TURN)]
    assert times[0].run_s.best == pytest.approx(times[1].run_s.best)
    assert times[0].run_s.worst == pytest.approx(times[1].run_s.worst)


def test_neither_side_has_the_memory_of_the_other() -> None:
    made = plan("16gpu-async")
    assert made.gpu is not None
    phases = {phase.phase: phase.uses.keys() for phase in made.gpu.phases}
    trainers_own = {Use.WEIGHTS, Use.GRADIENTS, Use.OPTIMIZER, Use.ACTIVATIONS}
    engines_own = {Use.ENGINE_WEIGHTS, Use.KV_CACHE, Use.CUDA_GRAPHS, Use.ENGINE_ACTIVATIONS}
    assert not phases[Phase.ROLLOUT] & trainers_own
    assert engines_own <= phases[Phase.ROLLOUT]
    for phase in (Phase.TRAINING, Phase.UPDATE_WEIGHTS, Phase.SAVE):
        assert not phases[phase] & engines_own
        assert trainers_own - {Use.ACTIVATIONS} <= phases[phase]
    colocated = plan("16gpu-fast")
    processes = [one.host[0].uses[Use.PROCESSES] for one in (made, colocated)]
    assert processes[1] - processes[0] == 4 * 6 * 10**9 + 4 * 8 * 10**9, "4 ranks and 4 of engines' processes fewer"


def test_the_machine_has_the_gpus_of_both() -> None:
    class Options:
        gpu, host_memory, disk, price, rates = "H100", "1TB", None, 2.5, None

    _, resolved = read_without_weights(["--recipe", "glm4.7-flash-16gpu-async", "--hf-checkpoint", str(PUBLISHED)])
    assert machine_of(Options(), resolved.config).gpus == 8  # type: ignore[arg-type]
    assert page(plan("16gpu-async"), ()).startswith(
        "glm4.7-flash-16gpu-async: 29.94 B parameters on 2 x 8 H100-80GB (8 train, 8 generate), "
    )


LEARNED_OTHERWISE = {
    "rollout.async_rollout",
    "rollout.max_staleness",
    "rollout.async_order",
    "rollout.update_weight_in_flight",
    "grpo.use_tis",
}


def tuner_of(recipe: str) -> Tuner:
    settings, resolved = read_without_weights(["--recipe", recipe, "--hf-checkpoint", str(PUBLISHED)])
    return Tuner(settings, resolved.architecture, Machine.described("H100-80GB", 8, "1TB", "2TB", 2.5), None)


def tried_keys(recipe: str) -> set[str]:
    """All that tuning turns."""
    tuner = tuner_of(recipe)
    config = tuner.given().plan.resolved.config
    spaces = (splits(config), engines(config, tuner.architecture), trainers(config, tuner.architecture))
    return {key for space in spaces for values in space for key in values}


@pytest.mark.parametrize("recipe", ASYNC)
def test_an_asynchronous_recipe_learns_otherwise_only_by_being_asynchronous(recipe: str) -> None:
    fast, beside = (
        read_settings(parse_command_line(["--recipe", f"glm4.7-flash-{recipe}-{end}"])) for end in ("fast", "async")
    )
    changed = {key for key in beside if key not in fast or fast[key].value != beside[key].value}
    turned = tried_keys(f"glm4.7-flash-{recipe}-async")
    assert changed - turned - {"misc.name", "cluster.colocate"} == LEARNED_OTHERWISE
    assert beside["grpo.use_tis"].value is True


@pytest.mark.parametrize("recipe", ASYNC)
def test_an_asynchronous_recipe_fits_and_beats_the_colocated_one(recipe: str) -> None:
    made, fast = plan(f"{recipe}-async"), plan(f"{recipe}-fast")
    assert made.problems == ()
    assert has_margin(made)
    assert made.gpu is not None
    assert min(one.margin for one in made.gpu.phases) > 4 * GIB
    assert made.time is not None
    assert fast.time is not None
    assert made.resolved.config.samples_per_rollout == fast.resolved.config.samples_per_rollout
    assert made.time.gpus == fast.time.gpus
    assert made.time.step_s.best < 0.8 * fast.time.step_s.best
    assert made.time.step_s.worst < 0.95 * fast.time.step_s.worst
    assert made.time.dollars.middle < 0.95 * fast.time.dollars.middle


def test_tuning_makes_nothing_asynchronous_and_no_token_older() -> None:
    for recipe in ("glm4.7-flash-16gpu-async", "glm4.7-flash-16gpu-fast", "glm4.7-flash-8gpu"):
        assert not tried_keys(recipe) & (LEARNED_OTHERWISE | {"cluster.colocate"})
    assert list(splits(tuner_of("glm4.7-flash-16gpu-fast").given().plan.resolved.config)) == [{}]


def test_tuning_divides_each_machine_otherwise() -> None:
    """Every division is a run whose settings hold together, of as many GPUs."""
    tuner = tuner_of("glm4.7-flash-16gpu-async")
    found = []
    for values in splits(tuner.given().plan.resolved.config):
        choice = tuner.choice(values)
        assert choice is not None
        assert choice.plan.time is not None
        assert choice.plan.time.gpus == 16
        found.append(choice.plan.time.engine_gpus)
    assert found == [8, 14, 12]
    rows = table(tuner.given(), [choice]).splitlines()
    [busy] = [row.split()[2:] for row in rows if row.startswith("    engines busy")]
    assert busy == next(row.split()[4:] for row in rows if row.startswith("  seconds of a step"))


def test_it_is_compared_with_the_colocated_recipe_of_as_many_gpus_under_the_same_flags() -> None:
    words = ["--recipe", "glm4.7-flash-16gpu-async", "--hf-checkpoint", str(PUBLISHED), "--num-rollout", "100"]
    settings, resolved = read_without_weights([*words, "--max-staleness", "2", "--sglang-ep-size", "2"])
    twin = colocated_twin(settings, resolved)
    assert twin is not None
    assert (twin.config.misc.name, twin.config.rollout.num_rollout) == ("glm4.7-flash-16gpu-fast", 100)
    assert (twin.config.rollout.max_staleness, twin.config.sglang.args["ep_size"]) == (None, 8)
    made, other = plan("16gpu-async"), plan("16gpu-fast")
    sentence = comparison(made, other)
    assert sentence.startswith("glm4.7-flash-16gpu-fast, colocated on as many GPUs, takes ")
    assert made.time is not None
    assert other.time is not None
    saved = round(100 * (1 - made.time.dollars.middle / other.time.dollars.middle))
    assert sentence.endswith(f"by the plan this one costs {saved}% less.")
    assert comparison(other, made).endswith("% more.")
    document = json.loads(as_json(made, (), other))
    assert document["colocated"]["step_s"] == [other.time.step_s.best, other.time.step_s.worst]
    assert document["time"]["sides"]["trainer"]["gpus"] == 8
    assert document["time"]["sides"]["engines"]["idle"] == [0, 0]
    assert json.loads(as_json(other, ()))["time"]["sides"] == {}


def test_what_has_no_twin_is_compared_with_nothing() -> None:
    for words in (
        ["--recipe", "glm4.7-flash-16gpu-fast"],
        ["--recipe", "glm4.7-flash-16gpu-async", "--rollout-num-gpus", "16"],
    ):
        assert colocated_twin(*read_without_weights([*words, "--hf-checkpoint", str(PUBLISHED)])) is None
    assert bases_of("glm4.7-flash-16gpu-async") == [
        "glm4.7-flash-16gpu-fast",
        "glm4.7-flash-16gpu",
        "glm4.7-flash-8gpu",
    ]
