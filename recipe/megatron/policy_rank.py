"""A process of the trainer without what learning needs: weights that are loaded, score samples and are written."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from recipe.config import Architecture, Config
from recipe.megatron import checkpoint, layout
from recipe.megatron.layout import Rendezvous
from recipe.megatron.model import build_chunks
from recipe.megatron.step import Microbatches, response_scores
from recipe.megatron.weights import gathered_weights, load_hugging_face
from recipe.messages import RankPart, Scores
from recipe.system.stopwatch import Stopwatch
from recipe.weights.checkpoints import is_hugging_face
from recipe.weights.hf_files import HuggingFaceCheckpoint, write_checkpoint
from recipe.weights.inspection import inspect
from recipe.weights.origin import mtp_of_origin, with_duplicates


class PolicyRank:
    """One process's shard of the policy, in the run's layout and precision."""

    def __init__(
        self, config: Config, architecture: Architecture, rendezvous: Rendezvous, stopwatch: Stopwatch | None = None
    ) -> None:
        """`stopwatch` is given the parts of the start."""
        self.config, self.architecture = config, architecture
        self.stopwatch = stopwatch or Stopwatch()
        layout.join(rendezvous, config, architecture)
        self.stopwatch.lap(RankPart.GROUPS)
        self.is_first = rendezvous.rank == 0
        self.chunks = build_chunks(config, architecture)

    def load_weights(self, directory: Path) -> None:
        """Takes those of a torch_dist or a Hugging Face directory. Raises UserError if they are not this model's."""
        if not is_hugging_face(directory):
            checkpoint.load_weights(directory, self.chunks)
            return
        source = HuggingFaceCheckpoint(directory)
        inspect(source, Architecture.from_checkpoint(directory), with_mtp=bool(self.config.mtp.mtp_num_layers))
        load_hugging_face(self.chunks, self.architecture, source)

    def log_probs(self, microbatches: Microbatches) -> Scores:
        """What the policy as it is gives the samples; see `response_scores`."""
        return response_scores(self.chunks, microbatches, records_routing=self.config.records_routing)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor of the policy, in turn; a collective, see `gathered_weights`."""
        return gathered_weights(self.chunks, self.architecture)

    def export_hugging_face(self, directory: Path) -> None:
        """Writes the policy as a Hugging Face checkpoint, with the files of the starting checkpoint and, if this
        trainer does without it, its MTP layer."""
        origin = HuggingFaceCheckpoint(self.config.model.hf_checkpoint)
        tensors = ((name, tensor.cpu()) for name, tensor in self.weights())
        if not self.is_first:
            for _ in tensors:
                pass
            return
        untrained = () if self.config.mtp.mtp_num_layers else mtp_of_origin(origin, self.architecture)
        whole = with_duplicates(itertools.chain(tensors, untrained), origin, self.architecture)
        write_checkpoint(whole, directory, companions=origin.directory)

    def close(self) -> None:
        """Leaves the process groups."""
        layout.leave()
