"""How per-token losses become one number. The denominators are those of the whole batch of an optimizer step, and the
tokens carry them as weights, so the loss is a plain sum over tokens: splitting the batch into any microbatches, packs
or ranks and adding up changes nothing."""

from collections.abc import Sequence


def sequence_weights(trainable_tokens: Sequence[int], *, per_token: bool) -> list[float]:
    """The weight of a trainable token of each sequence, for all the sequences of one optimizer step.

    `per_token`: every trainable token of the batch weighs the same (DAPO: Yu et al., arXiv:2503.14476, eq. 8).
    Otherwise every sequence does: the mean over its own tokens, then over sequences (GRPO: arXiv:2402.03300, eq. 3).
    Weights times token counts add up to 1. A sequence with no trainable token weighs 0 and is counted nowhere: a batch
    with it and without it has the same loss.
    """
    if per_token:
        tokens = sum(trainable_tokens)
        return [1 / tokens if count else 0.0 for count in trainable_tokens]
    sequences = sum(count > 0 for count in trainable_tokens)
    return [1 / (count * sequences) if count else 0.0 for count in trainable_tokens]
