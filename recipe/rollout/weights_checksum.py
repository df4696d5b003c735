"""Checksums of the policy's tensors as SGLang's /weights_checker tells them: of its own, fused tensors, by its names.

Both sides of a weight update compute them here, the trainer of what it sends and the embedded engine of what it holds.
SGLang's are of what each of its GPUs holds, so they are the whole tensors' on engines of one GPU only. An engine that
drafts tells those of its draft model too: the layer for multi-token prediction, and the policy's embedding and output
head, which it shares.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from recipe.rollout.weights_payload import NamedTensor

VOCABULARY_MULTIPLE = 64
"""SGLang pads embedding and output head with zeros to a multiple of as many rows."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(.*)\.(gate_proj|up_proj|q_a_proj|kv_a_proj_with_mqa)\.weight")
_FUSED_NAME = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_DRAFT = "draft."
_OF_THE_DRAFT_ITSELF = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
"""Names in a layer for multi-token prediction that SGLang does not count to its decoder layer."""
_SHARED_BY_THE_DRAFT = ("embed_tokens.weight", "shared_head.head.weight")


class EngineChecksums:
    """Takes a checkpoint's tensors one by one and keeps no more than those of an unfinished fused tensor."""

    def __init__(self, num_layers: int, num_experts: int, *, as_float32: bool = False) -> None:
        """Tensors of later layers are the draft model's. `as_float32`: the engine holds everything in it."""
        self._num_layers, self._num_experts, self._as_float32 = num_layers, num_experts, as_float32
        self._parts: dict[str, dict[tuple[int, int], Tensor]] = {}
        self._checksums: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the tensor of a checkpoint's name."""
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= self._num_layers:
            within = name[layer.end() :]
            if within in _SHARED_BY_THE_DRAFT:
                return
            name = f"{_DRAFT}model.{'' if within in _OF_THE_DRAFT_ITSELF else 'decoder.'}{within}"
        fused, place, count = self._place(name)
        parts = self._parts.setdefault(fused, {})
        parts[place] = tensor.detach().float() if self._as_float32 else tensor.detach()
        if len(parts) == count:
            checksum = _hash([self._parts[fused][key] for key in sorted(parts)], name in _VOCABULARY)
            self._checksums[fused] = checksum
            if name in _VOCABULARY:
                self._checksums[_DRAFT + fused] = checksum
            del self._parts[fused]

    def watch(self, weights: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """The same tensors, each taken as it passes."""
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    def result(self) -> dict[str, str]:
        """Checksum of the policy's tensors by SGLang's name; a fused tensor of which a part is missing has none."""
        return {name: checksum for name, checksum in self._checksums.items() if not name.startswith(_DRAFT)}

    def with_draft(self) -> dict[str, str]:
        """Likewise of the draft model's too."""
        return dict(self._checksums)

    def differing(self, engine: Mapping[str, str]) -> list[str]:
        """Names of the tensors that are not the same in the checksums an engine tells. Of its draft model, if it has
        one, those alone are compared that have passed here: what is not trained is not sent."""
        drafts = any(name.startswith(_DRAFT) for name in engine)
        expected = self._checksums if drafts else self.result()
        told = {name for name in engine if name in expected or not name.startswith(_DRAFT)}
        return sorted(name for name in expected.keys() | told if expected.get(name) != engine.get(name))

    def _place(self, name: str) -> tuple[str, tuple[int, int], int]:
        """SGLang's name of the tensor this one is a part of, its place there, and the number of parts."""
        if expert := _EXPERT.fullmatch(name):
            prefix, number, kind = expert[1], int(expert[2]), expert[3]
            if kind == "down":
                return f"{prefix}.w2_weight", (number, 0), self._num_experts
            return f"{prefix}.w13_weight", (number, int(kind == "up")), 2 * self._num_experts
        if part := _FUSED.fullmatch(name):
            return f"{part[1]}.{_FUSED_NAME[part[2]]}.weight", (0, int(part[2] in ("up_proj", "kv_a_proj_with_mqa"))), 2
        return name, (0, 0), 1


def overall(checksums: dict[str, str]) -> str:
    """One checksum of all."""
    digest = hashlib.sha256()
    for name in sorted(checksums):
        digest.update(name.encode() + checksums[name].encode())
    return digest.hexdigest()


def _hash(parts: list[Tensor], pad: bool) -> str:
    """SGLang's `tensor_hash` of the parts one after the other, in hexadecimal."""
    whole = torch.cat([part.reshape(-1) for part in parts])
    if pad:
        rows, width = parts[0].shape
        whole = torch.cat([whole, whole.new_zeros(-rows % VOCABULARY_MULTIPLE * width)])
    if whole.is_cuda:
        from sglang.srt.managers.mm_utils import tensor_hash  # a GPU kernel, in the environment that serves on GPUs

        return f"{tensor_hash(whole):016x}"
    return hashlib.sha256(whole.view(torch.uint8).numpy().data).hexdigest()[:16]
