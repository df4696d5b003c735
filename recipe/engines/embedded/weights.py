"""The model's weights by their names in a Hugging Face checkpoint, and their replacement, all or nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Glm4MoeLiteForCausalLM

from recipe.weight_sync.checksum import ExpectedChecksums
from recipe.weight_sync.tensor import NamedTensor

_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXACT_IN_FLOAT32 = {torch.float32, torch.bfloat16, torch.float16}


class WeightError(ValueError):
    """Weights that do not fit the model; none of them was taken."""


class WeightTable:
    """Checkpoint name -> the part of the model's storage that holds it.

    transformers keeps the experts of a layer in two tensors; a checkpoint names each expert's three.
    """

    def __init__(self, model: Glm4MoeLiteForCausalLM) -> None:
        self._layers, self._experts = model.config.num_hidden_layers, model.config.n_routed_experts
        persistent = model.state_dict(keep_vars=True)
        self._places: Mapping[str, Tensor] = {
            place: part for name, tensor in persistent.items() for place, part in _checkpoint_places(name, tensor.data)
        }

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


def _checkpoint_places(name: str, tensor: Tensor) -> Iterator[NamedTensor]:
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        yield name, tensor
        return
    for number, expert in enumerate(tensor):
        prefix = f"{experts['prefix']}.{number}"
        if experts["kind"] == "down_proj":
            yield f"{prefix}.down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield f"{prefix}.gate_proj.weight", gate
            yield f"{prefix}.up_proj.weight", up


def _read(folder: Path) -> Iterator[NamedTensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError("no *.safetensors file there")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)
