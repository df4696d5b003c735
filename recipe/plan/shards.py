"""How many parameters each training rank holds, by part: the weight table cut as the layout cuts it."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, cached_property
from typing import Self

from recipe.config import Architecture, Config
from recipe.weights.table import Placement, ShardCoordinates, placements

PARAMETER_MULTIPLE, BUFFER_MULTIPLE = 64, 128
"""megatron's distributed optimizer: a parameter begins at a multiple of the first in its buffer, and a buffer's size
divides by the ranks that share it and by the second."""
_MTP, _DECODER = "mtp.layers.0.", "decoder.layers."


class Part(StrEnum):
    """Parts of the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    EXPERTS = "routed experts"
    SHARED_EXPERTS = "shared experts"
    ROUTER = "routers"
    NORMS = "norms"
    OUTPUT_HEAD = "output head"
    MTP = "MTP layer"


@cache
def part_of(name: str) -> Part:
    """Where a megatron parameter belongs."""
    if name.startswith("mtp."):
        return Part.MTP
    for word, part in (
        ("norm", Part.NORMS),
        ("word_embeddings", Part.EMBEDDING),
        ("output_layer", Part.OUTPUT_HEAD),
        ("self_attention", Part.ATTENTION),
        ("shared_experts", Part.SHARED_EXPERTS),
        (".experts.", Part.EXPERTS),
        ("router", Part.ROUTER),
    ):
        if word in name:
            return part
    return Part.DENSE_MLP


def stage_lengths(config: Config, architecture: Architecture) -> list[int]:
    """Decoder layers of each pipeline stage."""
    perf, layers = config.perf, architecture.num_hidden_layers
    stages, first, last = (
        perf.pipeline_model_parallel_size,
        perf.decoder_first_pipeline_num_layers,
        perf.decoder_last_pipeline_num_layers,
    )
    ends = [length for length in (first, last) if length is not None]
    between = stages - len(ends)
    middle = [(layers - sum(ends)) // between] * between if between else []
    return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]


def chunk_layers(config: Config, architecture: Architecture) -> list[list[range]]:
    """For each pipeline stage, the decoder layers of its chunks: one, unless stages are interleaved."""
    lengths, per_chunk = stage_lengths(config, architecture), config.perf.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        starts = [sum(lengths[:stage]) for stage in range(len(lengths))]
        return [[range(start, start + length)] for start, length in zip(starts, lengths, strict=True)]
    stages, chunks = len(lengths), lengths[0] // per_chunk
    return [
        [range(start, start + per_chunk) for start in ((c * stages + s) * per_chunk for c in range(chunks))]
        for s in range(stages)
    ]


@cache
def table_of(architecture: Architecture, with_mtp: bool) -> Mapping[str, Placement]:
    """The weight table, made once."""
    return placements(architecture, with_mtp)


@dataclass(frozen=True)
class ChunkShard:
    """What one rank holds of one pipeline chunk."""

    elements: Mapping[Part, int]
    """Parameters by part; those that are trained and those that are not."""
    buffers: tuple[int, ...]
    """Elements of megatron's gradient buffers: of what all data-parallel ranks share, and of experts."""
    optimizer: int
    """Parameters whose optimizer state this rank holds, at most."""
    across: int
    """This rank's share of the elements of parameters whose optimizer state lies on several ranks, at most: the largest
    parameter at every boundary between two."""
    frozen: int
    """Parameters that are not trained (an MTP layer that is only carried along)."""
    biases: int
    """Elements of the routers' fp32 biases, which are no parameters."""


@dataclass(frozen=True)
class StageShard:
    """What one rank of a pipeline stage holds."""

    stage: int
    layers: tuple[int, ...]
    chunks: tuple[ChunkShard, ...]
    is_last: bool

    @cached_property
    def elements(self) -> Counter[Part]:
        """Parameters by part."""
        total: Counter[Part] = Counter()
        for chunk in self.chunks:
            total.update(chunk.elements)
        return total

    @property
    def parameters(self) -> int:
        """All parameters of the rank."""
        return self.elements.total()

    @property
    def buffer_elements(self) -> int:
        """Elements of its gradient buffers, padding included; its trained weights lie in buffers of the same size."""
        return sum(size for chunk in self.chunks for size in chunk.buffers)

    @property
    def weight_elements(self) -> int:
        """Elements its weights take: buffers, and what is not trained."""
        return self.buffer_elements + sum(chunk.frozen for chunk in self.chunks)

    @property
    def optimizer_elements(self) -> int:
        """Parameters whose optimizer state it holds."""
        return sum(chunk.optimizer for chunk in self.chunks)

    @property
    def bias_elements(self) -> int:
        """Elements of the fp32 router biases."""
        return sum(chunk.biases for chunk in self.chunks)


@dataclass(frozen=True)
class Layout:
    """The sizes that cut the model."""

    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    world: int

    @classmethod
    def of(cls, config: Config) -> Self:
        perf = config.perf
        return cls(
            tp=perf.tensor_model_parallel_size,
            pp=perf.pipeline_model_parallel_size,
            cp=perf.context_parallel_size,
            ep=perf.expert_model_parallel_size,
            etp=perf.expert_tensor_parallel_size,
            world=config.world_size,
        )

    @property
    def dense_replicas(self) -> int:
        """Ranks that share the optimizer of a parameter outside the experts (data- and context-parallel ones)."""
        return self.world // (self.tp * self.pp)

    @property
    def expert_replicas(self) -> int:
        """Ranks that share the optimizer of an expert."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def coordinates(self) -> ShardCoordinates:
        """A rank's shard; all are of one size."""
        return ShardCoordinates(tensor_size=self.tp, expert_tensor_size=self.etp, expert_size=self.ep)


def stage_shards(config: Config, architecture: Architecture) -> tuple[StageShard, ...]:
    """What a rank of each pipeline stage holds."""
    stages, mtp = tuple(map(tuple, chunk_layers(config, architecture))), config.mtp
    return _stages(architecture, bool(mtp.mtp_num_layers), mtp.enable_mtp_training, Layout.of(config), stages)


@cache
def _stages(
    architecture: Architecture,
    with_mtp: bool,
    trains_mtp: bool,
    layout: Layout,
    stages: tuple[tuple[range, ...], ...],
) -> tuple[StageShard, ...]:
    """Each layout's once: whoever tunes asks for few of them, hundreds of times."""
    table, shards = table_of(architecture, with_mtp), []
    for stage, ranges in enumerate(stages):
        chunks = []
        for number, layers in enumerate(ranges):
            first = stage == 0 and number == 0
            last = stage == len(stages) - 1 and number == len(ranges) - 1
            held = list(_held(table, layers, first, last))
            chunks.append(_chunk(held, layout, trains_mtp))
        numbers = tuple(number for layers in ranges for number in layers)
        shards.append(StageShard(stage, numbers, tuple(chunks), stage == len(stages) - 1))
    return tuple(shards)


def _held(table: Mapping[str, Placement], layers: range, first: bool, last: bool) -> Iterator[Placement]:
    """The table's entries of one chunk. The MTP layer at the end looks up words too."""
    with_mtp = any(name.startswith(_MTP) for name in table)
    for name, placement in table.items():
        if name.startswith(_DECODER):
            if int(name.removeprefix(_DECODER).split(".", 1)[0]) in layers:
                yield placement
        elif name.startswith("embedding."):
            if first or (last and with_mtp):
                yield placement
        elif last:
            yield placement


def _chunk(held: list[Placement], layout: Layout, trains_mtp: bool) -> ChunkShard:
    elements: Counter[Part] = Counter()
    trained: dict[bool, list[int]] = {False: [], True: []}
    frozen = biases = 0
    for placement in held:
        size, part = math.prod(placement.local_shape(layout.coordinates)), part_of(placement.name)
        if placement.is_fp32:
            biases += size
            continue
        elements[part] += size
        if part is Part.MTP and not trains_mtp:
            frozen += size
        else:
            trained[placement.is_expert].append(size)
    buffers, optimizer, across = [], 0, 0
    for is_expert, sizes in trained.items():
        replicas = layout.expert_replicas if is_expert else layout.dense_replicas
        padded = _round_up(
            sum(_round_up(size, PARAMETER_MULTIPLE) for size in sizes), math.lcm(replicas, BUFFER_MULTIPLE)
        )
        buffers.append(padded)
        optimizer += min(sum(sizes), padded // replicas)
        across += (replicas - 1) * max(sizes, default=0) // replicas
    return ChunkShard(elements, tuple(buffers), optimizer, across, frozen, biases)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
