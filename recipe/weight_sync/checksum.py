"""Checksums of the policy's tensors as SGLang's /weights_checker tells them: of its own, fused tensors, by its names.

Both sides of a weight update compute them here, the trainer of what it sends and the embedded engine of what it holds.
SGLang's are of what each rank of an engine holds, which `slices` knows. An engine that drafts tells those of
its draft model too: the layer for multi-token prediction, and the policy's embedding and output head, which it shares.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from recipe.config.sglang_rules import ONE_GPU, EngineLayout
from recipe.weight_sync.slices import Slice, slices
from recipe.weight_sync.tensor import NamedTensor

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ROUTER = ".mlp.gate.weight"
_DRAFT = "draft."
_OF_THE_DRAFT_ITSELF = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
"""Names in a layer for multi-token prediction that SGLang does not count to its decoder layer."""
_SHARED_BY_THE_DRAFT = ("embed_tokens.weight", "shared_head.head.weight")

RankChecksums = Mapping[int, Mapping[str, str]]
"""Checksum of every tensor by SGLang's name, for each tensor-parallel rank of an engine."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What has become of the tensors of an engine's ranks."""

    compared: int
    differing: list[str]
    """SGLang's names, with the rank where an engine has several."""


class ExpectedChecksums:
    """Takes a checkpoint's tensors one by one and keeps no more than the pieces of an unfinished tensor of SGLang's."""

    def __init__(
        self, num_layers: int, num_experts: int, layout: EngineLayout = ONE_GPU, *, as_float32: bool = False
    ) -> None:
        """`layout`: of the engine, which has one pipeline stage. Tensors of later layers are the draft model's.
        `as_float32`: the engine holds everything in it."""
        self._num_layers, self._num_experts, self._layout = num_layers, num_experts, layout
        self._as_float32 = as_float32
        self._pieces: dict[tuple[str, tuple[int, ...]], dict[tuple[int, int], Tensor]] = defaultdict(dict)
        self._checksums: dict[int, dict[str, tuple[str, ...]]] = {rank: {} for rank in range(layout.tp)}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the tensor of a checkpoint's name."""
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= self._num_layers:
            within = name[layer.end() :]
            if within in _SHARED_BY_THE_DRAFT:
                return
            name = f"{_DRAFT}model.{'' if within in _OF_THE_DRAFT_ITSELF else 'decoder.'}{within}"
        tensor = tensor.detach().float() if self._as_float32 else tensor.detach()
        for piece in slices(name, tensor, self._layout, self._num_experts):
            self._take(piece)

    def watch(self, weights: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Passes the tensors on, and takes the checksum of each."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def result(self) -> dict[str, str]:
        """Checksum of the policy's tensors on the first rank by SGLang's name; a fused tensor of which a part is
        missing has none."""
        return {name: checksum for name, checksum in self.with_draft()[0].items() if not name.startswith(_DRAFT)}

    def with_draft(self) -> dict[int, dict[str, str]]:
        """Checksums by rank of the engine and name of tensor, the draft model's too."""
        return {rank: {name: right[0] for name, right in held.items()} for rank, held in self._checksums.items()}

    def compare(self, engine: RankChecksums) -> Comparison:
        """With the checksums that an engine tells. Of its draft model, if it has one, those tensors alone are compared
        that have passed here: what is not trained is not sent."""
        compared, differing = 0, []
        for rank in sorted(self._checksums.keys() | engine.keys()):
            expected, told = self._checksums.get(rank, {}), engine.get(rank, {})
            drafts = any(name.startswith(_DRAFT) for name in told)
            names = {name for name in expected if drafts or not name.startswith(_DRAFT)}
            names |= {name for name in told if not name.startswith(_DRAFT)}
            compared += len(names)
            differing += [
                name if self._layout.tp == 1 else f"{name} on rank {rank}"
                for name in sorted(names)
                if told.get(name) not in expected.get(name, ())
            ]
        return Comparison(compared, differing)

    def _take(self, piece: Slice) -> None:
        pieces = self._pieces[piece.name, piece.ranks]
        pieces[piece.place] = piece.content
        if len(pieces) < piece.pieces:
            return
        del self._pieces[piece.name, piece.ranks]
        right = _checksums(piece.name, [pieces[place] for place in sorted(pieces)])
        for rank in piece.ranks:
            self._checksums[rank][piece.name] = right
            if piece.name in _VOCABULARY:
                self._checksums[rank][_DRAFT + piece.name] = right


def _checksums(name: str, pieces: list[Tensor]) -> tuple[str, ...]:
    """What SGLang may tell of the pieces one after the other: 0.5.21 holds the router in float32, whatever the rest is
    in."""
    whole = torch.cat([piece.reshape(-1) for piece in pieces])
    if name.endswith(_ROUTER) and whole.dtype != torch.float32:
        return _hash(whole), _hash(whole.float())
    return (_hash(whole),)


def gpu_hash() -> Callable[[Tensor], int]:
    """SGLang's hash of a tensor on a GPU, from the environment that serves there. The first call imports all of SGLang,
    which takes 20 seconds."""
    from sglang.srt.managers.mm_utils import tensor_hash

    return cast(Callable[[Tensor], int], tensor_hash)


def _hash(tensor: Tensor) -> str:
    """SGLang's `tensor_hash`, in hexadecimal."""
    if tensor.is_cuda:
        return f"{gpu_hash()(tensor):016x}"
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()[:16]
