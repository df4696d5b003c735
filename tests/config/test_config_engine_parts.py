"""Which machines and GPUs the engines lie on, and which ranks hand them their weights."""

import pytest
from config_support import Refusal, Try

from recipe.config import Config
from recipe.config.engine_placement import gpus_of_fullest_machine, machine_of_gpu, parts_of, weight_sources

APART = ("--no-colocate", "--recipe", "glm4.7-flash-16gpu")


def layout(config: Config) -> list[list[tuple[int, int, int]]]:
    """Of every part of every engine: machine, first GPU and number of GPUs."""
    engines = [parts_of(config, engine) for engine in range(config.num_engines)]
    for parts in engines:
        assert [part.node_rank for part in parts] == list(range(len(parts)))
        assert {part.nnodes for part in parts} == {len(parts)}
    return [[(part.machine, part.first_gpu, part.gpus) for part in parts] for parts in engines]


def test_the_engine_of_24_gpus_lies_on_three_machines_beside_the_ranks_on_its_gpus(resolve_8gpu: Try) -> None:
    config = resolve_8gpu("--recipe", "glm4.7-flash-24gpu").config
    assert layout(config) == [[(0, 0, 8), (1, 8, 8), (2, 16, 8)]]
    assert weight_sources(config, 0) == tuple(range(24))
    assert gpus_of_fullest_machine(config) == 8


def test_engines_of_their_own_gpus_lie_where_the_trainer_has_ranks(resolve_8gpu: Try) -> None:
    config = resolve_8gpu(*APART, "--rollout-num-gpus", "32", "--rollout-num-gpus-per-engine", "16").config
    assert layout(config) == [[(0, 0, 8), (1, 8, 8)], [(0, 16, 8), (1, 24, 8)]]
    assert weight_sources(config, 1) == (0,) * 8 + (8,) * 8
    assert gpus_of_fullest_machine(config) == 24
    small = ("--rollout-num-gpus-per-engine", "4", "--sglang-dp-size", "4", "--sglang-ep-size", "4")
    config = resolve_8gpu(*APART, "--rollout-num-gpus", "12", *small).config
    assert layout(config) == [[(0, 0, 4)], [(0, 4, 4)], [(1, 8, 4)]]
    assert [weight_sources(config, engine) for engine in range(3)] == [(0,) * 4, (0,) * 4, (8,) * 4]
    assert gpus_of_fullest_machine(config) == 16


def test_every_gpu_of_a_colocated_engine_has_its_weights_from_the_rank_on_it(resolve_8gpu: Try) -> None:
    small = ("--rollout-num-gpus-per-engine", "4", "--sglang-dp-size", "4", "--sglang-ep-size", "4")
    config = resolve_8gpu("--recipe", "glm4.7-flash-16gpu", *small).config
    given = [weight_sources(config, engine) for engine in range(config.num_engines)]
    assert given == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]


def test_one_machine_has_all_engines_of_its_run(resolve_8gpu: Try) -> None:
    """However few of its GPUs the trainer takes."""
    flags = ("--recipe", "glm4.7-flash-8gpu", "--no-colocate", "--actor-num-gpus-per-node", "2")
    layout_flags = ("--expert-model-parallel-size", "2", "--rollout-num-gpus", "8")
    config = resolve_8gpu(*flags, *layout_flags).config
    assert layout(config) == [[(0, 0, 8)]]
    assert {machine_of_gpu(config, number) for number in range(8)} == {0}
    assert gpus_of_fullest_machine(config) == 10


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ("--recipe", "glm4.7-flash-24gpu", "--rollout-num-gpus-per-engine", "12"),
            "--rollout-num-gpus-per-engine 12: an engine lies within one of the 3 machines, of which the trainer takes "
            "8 GPUs each, or on whole ones; valid: 1, 2, 4, 8 or 24",
        ),
        (
            (*APART, "--rollout-num-gpus", "48", "--rollout-num-gpus-per-engine", "24"),
            "--rollout-num-gpus-per-engine 24: an engine lies within one of the 2 machines",
        ),
        (
            ("--recipe", "glm4.7-flash-16gpu", "--rollout-num-gpus-per-engine", "16", "--sglang-pp-size", "2"),
            "--sglang-pp-size 2 on an engine on the trainer's GPUs (--colocate): SGLang would give each stage the "
            "weights of the first one's GPU",
        ),
        (
            (*APART, "--rollout-num-gpus", "16", "--rollout-num-gpus-per-engine", "16", "--sglang-pp-size", "2"),
            "--sglang-pp-size 2 on an engine over 2 machines: SGLang would give each stage the weights",
        ),
    ],
)
def test_engines_that_part_machines_are_refused(refusal: Refusal, flags: tuple[str, ...], sentence: str) -> None:
    assert sentence in refusal(*flags)


def test_the_embedded_engine_is_on_one_machine(refusal: Refusal) -> None:
    flags = ("--recipe", "tiny", "--actor-num-nodes", "2", "--actor-num-gpus-per-node", "1")
    told = refusal(*flags, "--rollout-num-gpus", "2", "--rollout-num-gpus-per-engine", "2")
    assert "over machines of 1, and the embedded one is one process: use --rollout-engine sglang, or 1" in told
