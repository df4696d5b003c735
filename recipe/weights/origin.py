"""What an export takes from the checkpoint that training started from: an untrained MTP layer, and copies."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from recipe.config import Architecture
from recipe.weights.hf_files import HuggingFaceCheckpoint
from recipe.weights.table import Placement, duplicates, placements


def mtp_table(architecture: Architecture) -> list[Placement]:
    """The placements of the MTP layer."""
    main = placements(architecture, with_mtp=False)
    return [entry for name, entry in placements(architecture, with_mtp=True).items() if name not in main]


def mtp_of_origin(origin: HuggingFaceCheckpoint, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the origin's MTP layer, if it has one."""
    names = (name for entry in mtp_table(architecture) for name in entry.hf_names)
    return ((name, origin.read(name)) for name in names if name in origin.headers)


def with_duplicates(
    tensors: Iterable[tuple[str, Tensor]], origin: HuggingFaceCheckpoint, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and after the embedding and the output head the copies that the origin's MTP layer carries."""
    copies = {original: copy for copy, original in duplicates(architecture).items() if copy in origin.headers}
    for name, tensor in tensors:
        yield name, tensor
        if name in copies:
            yield copies[name], tensor.clone()
