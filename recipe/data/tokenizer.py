"""Loading a checkpoint's tokenizer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from recipe.system.errors import UserError
from recipe.system.imports import undisturbed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_FILE = "tokenizer.json"
READER_OF_GGUF = "transformers.modeling_gguf_pytorch_utils"
"""What transformers imports beside its tokenizers, for files of another kind; it takes torch, and two seconds."""


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of the Hugging Face checkpoint in `directory`, read from disk alone.

    Raises UserError if there is none, or none that can be read.
    """
    _require(directory)
    with undisturbed(), _without_reader_of_gguf():
        # What AutoTokenizer chooses for this architecture, after seconds in which it loads what all others need.
        from transformers import PreTrainedTokenizerFast

    with _in_a_sentence(directory):
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def load_decoder(directory: Path) -> "Tokenizer":
    """What decodes the tokens of the Hugging Face checkpoint in `directory`, without transformers, which takes a second
    to import.

    Raises UserError if there is none, or none that can be read.
    """
    from tokenizers import Tokenizer

    _require(directory)
    with _in_a_sentence(directory):
        return Tokenizer.from_file(str(directory / _FILE))


def _require(directory: Path) -> None:
    if not (directory / _FILE).is_file():
        raise UserError(f"{directory} has no {_FILE}: --hf-checkpoint must name a Hugging Face checkpoint")


@contextmanager
def _in_a_sentence(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a file that is none makes of it
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the tokenizer in {directory} cannot be read ({told}): download it again") from error


@contextmanager
def _without_reader_of_gguf() -> Iterator[None]:
    """It is not imported in the block, unless it has been before; afterwards it can be. What is imported in the block
    goes without it for good."""
    if READER_OF_GGUF in sys.modules:
        yield
        return
    nothing = ModuleType(READER_OF_GGUF)
    nothing.__dict__["load_gguf_checkpoint"] = None
    sys.modules[READER_OF_GGUF] = nothing
    try:
        yield
    finally:
        del sys.modules[READER_OF_GGUF]
