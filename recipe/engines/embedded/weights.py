"""The model's weights by their names in a Hugging Face checkpoint, and their replacement, all or nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipe.engines.embedded.fused import FusedModel
from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.tensor import NamedTensor

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXACT_IN_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}


class WeightError(ValueError):
    """Weights that do not fit the model; none of them was taken."""


class WeightTable:
    """Puts weights where the engine computes with them."""

    def __init__(self, model: FusedModel) -> None:
        self._layers, self._experts = model.architecture.num_hidden_layers, model.architecture.n_routed_experts
        self._places: Mapping[str, Tensor] = model.parts

    def replace(self, weights: Iterable[NamedTensor]) -> None:
        """Copies the weights into the model. The tensors of multi-token-prediction layers, which the engine does not
        run, are left out. Raises WeightError, before anything is written, if one does not fit."""
        fitting = [(self._place(name, tensor), tensor) for name, tensor in weights if not self._is_mtp(name)]
        for place, tensor in fitting:
            place.copy_(tensor)

    def replace_all(self, folder: Path) -> None:
        """Reads a checkpoint's safetensors files. Raises WeightError if one is damaged or a weight is missing."""
        try:
            weights = dict(_read(folder))
        except (OSError, SafetensorError) as error:
            raise WeightError(f"cannot read the weights in {folder}: {error}") from error
        missing = self._places.keys() - weights.keys()
        if missing:
            raise WeightError(f"{folder} lacks {len(missing)} of the model's weights, among them {min(missing)}")
        self.replace(weights.items())

    def checksums(self) -> dict[str, str]:
        """Checksum of every tensor, as SGLang would hold and name it."""
        checksums = ExpectedChecksums(self._layers, self._experts)
        for name, place in self._places.items():
            checksums.add(name, place)
        return checksums.result()

    def _is_mtp(self, name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is not None and int(layer[1]) >= self._layers

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        place = self._places.get(name)
        if place is None:
            raise WeightError(f"the model has no weight {name}")
        if place.shape != tensor.shape:
            raise WeightError(f"{name} has shape {list(tensor.shape)}, the model's has {list(place.shape)}")
        if tensor.dtype not in _EXACT_IN_FLOAT32:
            raise WeightError(f"{name} is {tensor.dtype}, which float32 does not hold exactly")
        return place


def _read(folder: Path) -> Iterator[NamedTensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError("no *.safetensors file there")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)
