"""A search small enough to run in a test: two scales, 8 channels, 32 px."""

import torch

from lipfast import search
from lipfast.fit import FitConfig

NETWORK = {"in_channels": 4, "down": [8, 8], "skip": 2}
CONFIG = search.SearchConfig(rounds=3, network=NETWORK, seed=7)
FIT = FitConfig(iterations=12, stop="wmv", window=4)


def picture(seed=0, size=32):
    """A smooth random picture (3, size, size)."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0]
