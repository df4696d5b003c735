"""Loading a checkpoint's tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from recipe.system.errors import UserError
from recipe.system.imports import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of the Hugging Face checkpoint in `directory`, read from disk alone.

    Raises UserError if there is none, or none that can be read.
    """
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json: --hf-checkpoint must name a Hugging Face checkpoint")
    with undisturbed():
        # What AutoTokenizer chooses for this architecture, after seconds in which it loads what all others need.
        from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a file that is none makes of it
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"the tokenizer in {directory} cannot be read ({told}): download it again") from error
