"""GLM-4.7-Flash at full size without its weights: the trainer's table against transformers' names and shapes, and what
every rank of real layouts holds and reads of them."""

import itertools
import math
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from full_size_support import (
    Box,
    RankView,
    Shape,
    as_stored,
    main_model_shapes,
    mtp_shapes,
    resolve_full_size,
    view_ranks,
)
from safetensors import safe_open
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from recipe.config import Architecture
from recipe.plan.shards import stage_shards
from recipe.weights.table import Placement, placements
from recipe.weights.tiny import tiny_config

EMBEDDING = "embedding.word_embeddings.weight"
MTP = ("--mtp-num-layers", "1")
PP8 = ("--pipeline-model-parallel-size", "8", "--expert-model-parallel-size", "1")
UNEVEN_ENDS = ("--decoder-first-pipeline-num-layers", "7", "--decoder-last-pipeline-num-layers", "4")
TP2_ETP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "2")
PP2_EP2 = ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2")
LAYOUTS = {
    "TP1-EP8": (("--recipe", "glm4.7-flash-8gpu-mtp"), (47,)),
    "TP4-PP2-CP2-EP8": (("--recipe", "glm4.7-flash-16gpu", *MTP), (24, 23)),
    "TP4-PP3-CP2-EP8": (("--recipe", "glm4.7-flash-24gpu", *MTP), (16, 16, 15)),
    "PP8": (("--recipe", "glm4.7-flash-8gpu", *MTP, *PP8, *UNEVEN_ENDS), (7, 6, 6, 6, 6, 6, 6, 4)),
    "TP2-ETP2-PP2-EP2": (
        ("--recipe", "glm4.7-flash-8gpu", *MTP, *TP2_ETP2, *PP2_EP2, "--decoder-last-pipeline-num-layers", "23"),
        (24, 23),
    ),
}
"""Flags of each layout, and the decoder layers of its stages."""


@cache
def checkpoint_shapes() -> dict[str, Shape]:
    """The whole checkpoint's names and shapes, from transformers and the names of the MTP layer."""
    main_model = main_model_shapes()
    return main_model | mtp_shapes(main_model)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Placement]:
    flags, _ = LAYOUTS["TP1-EP8"]
    return placements(resolve_full_size(tmp_path_factory.mktemp("table"), flags).architecture, with_mtp=True)


@pytest.fixture(scope="module")
def pretended_ranks() -> Iterator[ProcessPoolExecutor]:
    """A process for torch as the trainer prepares it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield pool


@pytest.fixture(scope="module", params=LAYOUTS)
def flags_and_layers(request: pytest.FixtureRequest) -> tuple[Sequence[str], Sequence[int]]:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def layout(
    flags_and_layers: tuple[Sequence[str], Sequence[int]],
    pretended_ranks: ProcessPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[RankView], Sequence[int]]:
    """Every rank of a layout, and the decoder layers of its stages."""
    flags, layers = flags_and_layers
    resolved = resolve_full_size(tmp_path_factory.mktemp("layout"), flags)
    return pretended_ranks.submit(view_ranks, resolved, checkpoint_shapes()).result(), layers


def test_tensors_and_parameters_are_as_many_as_published() -> None:
    main_model = main_model_shapes()
    mtp = mtp_shapes(main_model)
    assert (len(main_model), len(mtp), len(main_model | mtp)) == (9491, 210, 9701)
    assert round(sum(map(math.prod, main_model.values())) / 1e9, 2) == 29.94
    assert round(sum(map(math.prod, mtp.values())) / 1e9, 3) == 0.644


def test_transformers_stores_experts_one_by_one(tmp_path: Path) -> None:
    """The stored names that everything here is held against are those that transformers itself writes."""
    tiny = {name: value for name, value in tiny_config(128, [1], 0).items() if name != "dtype"}
    model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**tiny))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert as_stored({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}) == written


def test_table_names_every_tensor_once_with_its_shape(table: dict[str, Placement]) -> None:
    named = [(name, placement.hf_shape) for placement in table.values() for name in placement.hf_names]
    assert len(named) == len(checkpoint_shapes())
    assert dict(named) == checkpoint_shapes()


def test_table_without_mtp_is_the_main_model(tmp_path: Path) -> None:
    architecture: Architecture = resolve_full_size(tmp_path, LAYOUTS["TP1-EP8"][0]).architecture
    without = placements(architecture, with_mtp=False)
    assert {name for placement in without.values() for name in placement.hf_names} == main_model_shapes().keys()


def test_stages_split_the_layers_and_hold_all_names(
    layout: tuple[list[RankView], Sequence[int]], table: dict[str, Placement]
) -> None:
    views, layers = layout
    names: dict[int, set[str]] = {}
    layers_of: dict[int, tuple[int, ...]] = {}
    for view in views:
        assert names.setdefault(view.stage, set(view.shapes)) == set(view.shapes)
        assert layers_of.setdefault(view.stage, view.layers) == view.layers
    stages = range(len(layers))
    assert [len(layers_of[stage]) for stage in stages] == list(layers)
    assert [number for stage in stages for number in layers_of[stage]] == list(range(47))
    held = Counter(name for stage in stages for name in names[stage])
    assert held.keys() == table.keys()
    # The MTP layer at the end needs an embedding, as the first stage does.
    twice = {EMBEDDING} if len(layers) > 1 else set()
    assert {name for name, count in held.items() if count > 1} == twice
    assert EMBEDDING in names[0] & names[stages[-1]]


def test_megatrons_parameters_have_the_tables_form(
    layout: tuple[list[RankView], Sequence[int]], table: dict[str, Placement]
) -> None:
    views, _ = layout
    for view in views:
        for name, shape in view.shapes.items():
            placement = table[name]
            assert merged(placement.local_shape(view.at), len(shape)) == shape, name
            assert view.dtypes[name] == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16), name
            axis = placement.tensor_axis
            if axis is not None and len(shape) > len(placement.hf_shape):
                axis += len(placement.grid)
            assert view.split_axes.get(name) == axis, name


def merged(shape: Shape, axes: int) -> Shape:
    """The shape with its leading axes multiplied together until `axes` are left."""
    leading = len(shape) - axes + 1
    return (math.prod(shape[:leading]), *shape[leading:])


def test_a_rank_holds_as_many_parameters_as_the_plan_says(
    layout: tuple[list[RankView], Sequence[int]], flags_and_layers: tuple[Sequence[str], Sequence[int]], tmp_path: Path
) -> None:
    flags, _ = flags_and_layers
    resolved = resolve_full_size(tmp_path, flags)
    shards = stage_shards(resolved.config, resolved.architecture)
    views, _ = layout
    for view in views:
        assert shards[view.stage].layers == view.layers
        assert shards[view.stage].parameters + shards[view.stage].bias_elements == view.held


def test_a_rank_reads_just_what_it_holds(layout: tuple[list[RankView], Sequence[int]]) -> None:
    views, _ = layout
    for view in views:
        assert len(set(view.reads)) == len(view.reads)
        assert sum(volume(box) for _, box in view.reads) == view.held


def test_a_rank_reads_the_experts_and_the_words_that_megatron_computes_there(
    layout: tuple[list[RankView], Sequence[int]],
) -> None:
    views, _ = layout
    for view in views:
        experts: dict[str, list[int]] = defaultdict(list)
        for name, box in view.reads:
            layer, is_expert, rest = name.partition(".mlp.experts.")
            if is_expert and rest.endswith("gate_proj.weight"):
                experts[layer].append(int(rest.split(".")[0]))
            if name == "model.embed_tokens.weight":
                assert box[0] == view.vocabulary
        assert {tuple(numbers) for numbers in experts.values()} == view.local_experts


def test_all_ranks_together_read_every_element_equally_often(
    layout: tuple[list[RankView], Sequence[int]],
) -> None:
    views, layers = layout
    ranks_of_a_stage = len(views) // len(layers)
    copies: dict[str, Counter[Box]] = defaultdict(Counter)
    for view in views:
        for name, box in view.reads:
            copies[name][box] += 1
    assert copies.keys() == checkpoint_shapes().keys()
    for name, boxes in copies.items():
        assert tiles(checkpoint_shapes()[name], boxes), name
        assert len(set(boxes.values())) == 1, f"{name}: {boxes}"
        readers = ranks_of_a_stage
        if ".mlp.experts." in name:
            readers //= views[0].at.expert_size
        if name == "model.embed_tokens.weight" and len(layers) > 1:
            readers *= 2
        assert boxes.total() == readers, name


def tiles(shape: Shape, boxes: Mapping[Box, int]) -> bool:
    """Whether the boxes fill a tensor of this shape without gap or overlap."""
    inside = all(0 <= start < stop <= length for box in boxes for (start, stop), length in zip(box, shape, strict=True))
    return inside and sum(map(volume, boxes)) == math.prod(shape) and not any(itertools.starmap(overlap, pairs(boxes)))


def pairs(boxes: Mapping[Box, int]) -> Iterator[tuple[Box, Box]]:
    return itertools.combinations(boxes, 2)


def overlap(one: Box, other: Box) -> bool:
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))


def volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
