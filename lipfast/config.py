"""Names and random streams that follow from configurations."""

import hashlib


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one random stream. Different purposes and neighbouring seeds give unrelated streams.

    Args:
        seed: the user's.
        purpose: what the stream is for, for example "fit/noise". Changing the text changes all results.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
