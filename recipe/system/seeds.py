"""Named random streams. A stream is identified by a path of names under the run's seed and has no hidden state:
a resumed run derives exactly the seeds that the uninterrupted run would have used."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit child seed for the stream `names` under `seed`, the same on every machine."""
    path = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1
