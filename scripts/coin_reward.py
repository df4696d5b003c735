"""A reward for models with random weights, whose answers are never right: half of all responses get it, so that groups
differ and the weights move.

    --custom-rm-path scripts.coin_reward:reward
"""

import zlib

HEAD = 400
"""Characters of a response that decide."""


def reward(prompt: object, response: str, label: str) -> float:
    """1 or 0, by the checksum of the response's head."""
    return float(zlib.crc32(response[:HEAD].encode()) % 2)
