"""Prompts that no engine may be sent: SGLang does not refuse them, it ends."""

from recipe.data.prompts import Prompt
from recipe.system.errors import UserError


def check_prompt(prompt: Prompt, vocab_size: int | None) -> None:
    """Raises UserError if the prompt is empty or has a token id outside the vocabulary (None: of any size)."""
    if not prompt.ids:
        raise UserError(f"prompt {prompt.index} has no tokens: take it out of the prompt file")
    for token in (min(prompt.ids), max(prompt.ids)):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise UserError(
                f"prompt {prompt.index} has the token id {token}, outside the model's vocabulary of {vocab_size}: the "
                "tokenizer is not the model's; check that --hf-checkpoint has both from one source"
            )
