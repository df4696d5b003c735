"""The experts that an engine took for each token, as SGLang tells them (`--enable-return-routed-experts`).

Letters: N tokens of prompt and response, L layers of the model, M of them with experts, K experts a token.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recipe.config import Architecture
from recipe.messages import RoutedExperts


@dataclass(frozen=True, slots=True)
class RouterShape:
    """What the routers of a model choose from."""

    layers: int
    """L."""
    first_layer: int
    """The first one with experts; those before it are dense."""
    top_k: int
    """K."""
    experts: int
    """Of a layer."""

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        return cls(
            architecture.num_hidden_layers,
            architecture.first_k_dense_replace,
            architecture.num_experts_per_tok,
            architecture.n_routed_experts,
        )


def read_routed_experts(told: object, shape: RouterShape) -> RoutedExperts:
    """[N - 1, M, K] of SGLang's base64 of int32 [N - 1, L, K]: the last token, which the engine has not read, was not
    routed. Raises ValueError if it is something else, or a token was taken to fewer than K experts of the model."""
    if not isinstance(told, str):
        raise ValueError("it tells no routed_experts: is it started with --enable-return-routed-experts?")
    try:
        flat = np.frombuffer(base64.b64decode(told, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"routed_experts is no base64 of 32-bit numbers: {error}") from error
    rows, rest = divmod(flat.size, shape.layers * shape.top_k)
    if rest:
        raise ValueError(f"routed_experts has {flat.size} numbers, for {shape.layers} layers of {shape.top_k} experts")
    chosen = flat.reshape(rows, shape.layers, shape.top_k)[:, shape.first_layer :]
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < shape.experts:
        raise ValueError(f"routed_experts has values from {chosen.min()} to {chosen.max()} of {shape.experts} experts")
    experts = chosen.astype(np.uint8)
    if _has_duplicates(experts):
        raise ValueError("routed_experts takes a token to one expert twice: the engine has not recorded it")
    return experts


def encode_routed_experts(experts: NDArray[np.int32]) -> str:
    """[N - 1, L, K] as SGLang tells it."""
    return base64.b64encode(np.ascontiguousarray(experts, dtype="<i4").tobytes()).decode()


def _has_duplicates(experts: RoutedExperts) -> bool:
    top_k = experts.shape[-1]
    pairs = ((one, other) for one in range(top_k) for other in range(one))
    return any(bool((experts[..., one] == experts[..., other]).any()) for one, other in pairs)
